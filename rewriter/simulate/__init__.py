"""Performance models of attention accelerators, evaluated in closed form."""
