"""The measurements as a picture."""

from collections.abc import Mapping
from pathlib import Path

from llmtrain.config.optimise import Optimising
from llmtrain.optimise.compare import BF16, FP32


def draw(found: Mapping[str, float], config: Optimising, form: str, png_path: Path) -> None:
    """Speed by batch size, the loss of quality with its interval, and bytes: the form beside PyTorch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parties = {"PyTorch fp32": f"{FP32}/", "PyTorch bf16": f"{BF16}/", form: ""}
    parties = {name: prefix for name, prefix in parties.items() if f"{prefix}perplexity" in found}
    figure = Figure(figsize=(12, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    (decode, prefill, quality), (first, memory, weights) = figure.subplots(2, 3)
    for axes, kind in ((decode, "decode"), (prefill, "prefill")):
        for number, (name, prefix) in enumerate(parties.items()):
            speeds = [found[f"{prefix}{kind}_tokens_per_second_batch_{size}"] for size in config.batch_sizes]
            places = [place + 0.27 * (number - 1) for place in range(len(speeds))]
            axes.bar(places, speeds, width=0.25, label=name, color=f"C{number}")
        axes.set_xticks(range(len(config.batch_sizes)), [f"{size} together" for size in config.batch_sizes])
        axes.set_title(f"{kind.capitalize()}, tokens / s", fontsize=10)
        axes.legend(fontsize=8)
    compared = {name: prefix for name, prefix in parties.items() if prefix != f"{FP32}/"}
    values = [100 * found[f"{prefix}perplexity_increase"] for prefix in compared.values()]
    ends = [
        [100 * abs(found[f"{prefix}perplexity_increase{end}"] - found[f"{prefix}perplexity_increase"])
         for prefix in compared.values()]
        for end in ("_low", "_high")
    ]  # fmt: skip
    quality.errorbar(list(compared), values, ends, fmt="o", capsize=4, color="C3")
    quality.axhline(100 * config.most_perplexity_increase, linestyle=":", color="C7", label="the most allowed")
    quality.margins(x=0.4)
    quality.legend(fontsize=8)
    quality.set_title("Perplexity over PyTorch's in fp32, % (95 %)", fontsize=10)
    singles = ((first, "first_token_seconds", 1e3, "First token, ms"), (memory, "peak_bytes", 1e-6, "Peak memory, MB"))
    for axes, key, scale, title in (*singles, (weights, "weights_bytes", 1e-6, "Weights, MB")):
        heights = [found[f"{prefix}{key}"] * scale for prefix in parties.values()]
        axes.bar(list(parties), heights, color=[f"C{number}" for number in range(len(parties))])
        axes.set_title(title, fontsize=10)
    for axes in figure.axes:
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(png_path, format="png")
