"""Three models as ONNX by four roads: sites fused, loads or not, equal or not, time.

The roads: torch's plain export; that file through ``onnxruntime.transformers.optimizer``; the same
export through ``onnxscript``'s ``optimize_for_ort``; and `attn_rewrite.export_onnx` under the
policy ``exact`` for ONNX Runtime.  Random weights, two layers, one attention a layer.  Files are
compared with PyTorch at the exported batch and length and at others; all that load are timed in one
process in turns, and the ratio is that of the plain export's minimum.

    python examples/benchmarks/onnx_peers.py --length 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import hardware

RESULTS = Path(__file__).parent / "results" / "onnx_peers.json"
ATTENTIONS = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention")
WIDTHS = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512,
    "vocab_size": 999, "max_position_embeddings": 4096, "use_cache": False,
}  # fmt: skip


def models() -> dict[str, torch.nn.Module]:
    import transformers as t

    gpt2 = t.GPT2Config(
        vocab_size=999, n_positions=4096, n_embd=256, n_layer=2, n_head=4, use_cache=False
    )
    return {
        "bert": t.BertModel(t.BertConfig(**WIDTHS), add_pooling_layer=False),
        "gpt2": t.GPT2Model(gpt2),
        "llama": t.LlamaModel(t.LlamaConfig(num_key_value_heads=2, **WIDTHS)),
    }


class FirstOutput(torch.nn.Module):
    """The hidden states of a model of transformers, from its token ids."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids)[0]


def tokens(batch: int, length: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(length)
    return torch.randint(3, 999, (batch, length), generator=random)


def write_plain(model: torch.nn.Module, place: Path) -> None:
    axes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    torch.onnx.export(
        model, (tokens(2, 64),), place, dynamo=True, dynamic_shapes=axes, verbose=False,
        external_data=False,
    )  # fmt: skip


def write_optimizer(plain: Path, place: Path, kind: str) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    types = {"llama": "gpt2"}
    done = optimize_model(
        str(plain), model_type=types.get(kind, kind), num_heads=4, hidden_size=256, opt_level=0
    )
    done.save_model_to_file(str(place))


def write_fusions(plain: Path, place: Path) -> None:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    found = optimize_for_ort(ir.load(plain))
    ir.save(found[0] if isinstance(found, tuple) else found, place)


def write_ours(model: torch.nn.Module, place: Path) -> None:
    import attn_rewrite as ar

    done = ar.optimize(model, "exact", (tokens(2, 64),))
    ar.export_onnx(done, place, target="onnxruntime")


def attentions(place: Path) -> int:
    """Attention operators in a file, or functions of ours that stand for one."""
    import onnx

    proto = onnx.load(place, load_external_data=False)
    ours = {f.name for f in proto.functions if f.domain == "attn_rewrite"}
    marked = {
        p.value for n in proto.graph.node for p in n.metadata_props if p.key == "attn_rewrite.site"
    }
    named = sum(n.op_type in ATTENTIONS for n in proto.graph.node)
    return max(named, len(ours), len(marked))


def tried(action: Callable[[], Any]) -> str | None:
    """None, or in a few words what an optimizer or a session raised: a result of this table."""
    try:
        action()
    except Exception as error:  # whatever a peer raises is what is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return None


def difference(session: Any, model: torch.nn.Module, batch: int, length: int) -> float:
    ids = tokens(batch, length)
    name = session.get_inputs()[0].name
    with torch.no_grad():
        wanted = model(ids).numpy()
    return float(np.abs(session.run(None, {name: ids.numpy()})[0] - wanted).max())


def row(kind: str, model: torch.nn.Module, folder: Path, options: Any) -> dict[str, Any]:
    from attn_rewrite.backends.onnx.runtime import open_session

    places = {n: folder / f"{kind}.{n}.onnx" for n in ("plain", "optimizer", "ort_fusions", "ours")}
    write_plain(model, places["plain"])
    roads: dict[str, Callable[[], None]] = {
        "plain": lambda: None,
        "optimizer": lambda: write_optimizer(places["plain"], places["optimizer"], kind),
        "ort_fusions": lambda: write_fusions(places["plain"], places["ort_fusions"]),
        "ours": lambda: write_ours(model, places["ours"]),
    }
    found: dict[str, Any] = {}
    sessions: dict[str, Any] = {}
    for name, write in roads.items():
        failed = tried(write)
        if failed is None:
            failed = tried(lambda n=name: sessions.update({n: open_session(places[n])}))
        found[name] = {
            "fused": attentions(places[name]) if places[name].exists() else 0,
            "sites": 2,
            "loads": name in sessions,
            "error": failed,
        }
        if name in sessions:
            for batch, length in ((2, 64), (1, 48), (3, 100)):
                gap: list[float] = []
                wrong = tried(lambda s=sessions[name], b=batch, n=length, g=gap: g.append(
                    difference(s, model, b, n)))  # fmt: skip
                found[name][f"difference {batch}x{length}"] = gap[0] if gap else wrong
    ids = tokens(1, options.length).numpy()
    times: dict[str, list[float]] = {n: [] for n in sessions}
    for turn in range(options.repetitions + 1):
        for name, session in sessions.items():
            start = time.perf_counter()
            if tried(lambda s=session: s.run(None, {s.get_inputs()[0].name: ids})) is None and turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    for name, taken in times.items():
        if taken:
            found[name] |= {"min_ms": round(min(taken), 2)}
            found[name] |= {"median_ms": round(statistics.median(taken), 2)}
            found[name]["faster_than_plain"] = round(min(times["plain"]) / min(taken), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--models", nargs="+", default=["bert", "gpt2", "llama"])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    import onnxruntime
    import onnxscript
    import transformers

    torch.manual_seed(0)
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, model in models().items():
            if kind in options.models:
                rows[kind] = row(kind, FirstOutput(model).eval(), Path(name), options)
                print(kind, json.dumps(rows[kind], indent=2))
    used = (onnxruntime, onnxscript, transformers, torch)
    earlier = json.loads(options.output.read_text()) if options.output.exists() else {}
    conditions = {
        "date": date.today().isoformat(), "machine": hardware(), "threads": 2,
        "versions": {m.__name__: m.__version__ for m in used},
        "length": options.length, "repetitions": options.repetitions,
    }  # fmt: skip
    # Rows of other models stay: every row says under which conditions it was measured.
    rows = {kind: {**conditions, "roads": found} for kind, found in rows.items()}
    document = {**earlier, **rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
