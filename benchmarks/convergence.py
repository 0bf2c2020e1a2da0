"""Does training with fused kernels go where training with plain PyTorch goes? Losses from one seed, as in Figure 2.

    python benchmarks/convergence.py --style IMG --data DIR --vgg FILE --out docs/convergence.json

Two runs of plain PyTorch from one seed differ too: sums added in another order are rounded differently, and training
amplifies that. On a GPU, where atomics add in any order, plain PyTorch trains three times in the same way. A CPU
repeats a run bit for bit on the same number of threads, so there the three runs use different numbers, over which sums
are split. The fused run agrees if it is no farther from the mean of the three than they are from each other.

Writes FILE.json with every loss, and FILE.png beside it. The exit status is 1 if a fused run does not agree.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rows
import torch

from fastperc import backends
from fastperc.cli.options import add_device, add_layers, natural, path, positive
from fastperc.cli.training_options import recipe_fields
from fastperc.devices import device_name
from fastperc.errors import InputError
from fastperc.files import check_writable, write_atomically
from fastperc.training.charts import GRAY, ORANGE, Band, Curve, Panel, loss_chart, running_mean
from fastperc.training.figure2 import RUNS, read_losses, with_blocks
from fastperc.training.loop import train
from fastperc.training.resume import is_complete
from fastperc.training.run_folder import LOSSES
from fastperc.training.style import StyleRecipe

THREADS = (1, 2, 3)  # on a CPU: one plain run with each number
WINDOW = (
    25  # iterations over which losses are averaged. Each iteration is of other photos, so that its loss alone jumps
)

Losses = list[float]


def losses_of(recipe: StyleRecipe, threads: int | None, fused: bool) -> Losses:
    """The loss of each iteration of ``recipe``, trained by fastperc's kernels (``fused``) or by plain PyTorch alone.

    Args:
        recipe: what to train.
        threads: how many threads to train with. Default: as many as PyTorch uses now.
        fused: whether fastperc's kernels may run.

    Raises:
        KeyboardInterrupt: a signal stopped the run.
        RuntimeError: a kernel of fastperc's ran in a plain run, or none in a fused run.
    """
    with ExitStack() as stack:
        choices = stack.enter_context(backends.recorded())
        if threads is not None:
            stack.enter_context(using_threads(threads))
        if not fused:
            stack.enter_context(backends.use_backend("reference"))
        out = Path(stack.enter_context(TemporaryDirectory()))
        train(recipe, out)
        if not is_complete(recipe, out):
            raise KeyboardInterrupt
        used = {choice.backend for choice in choices}
        if (used == {"reference"}) == fused:
            raise RuntimeError(f"the {'fused' if fused else 'plain'} run ran on {', '.join(sorted(used))}")
        return read_losses(out / LOSSES, recipe.iterations)


@contextmanager
def using_threads(n: int) -> Iterator[None]:
    """PyTorch uses ``n`` threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(stock: Sequence[Losses], fused: Losses) -> dict[str, Any]:
    """Compares running means of the losses: how far ``fused`` is from the ``stock`` runs, and those from each other.

    Returns:
        ``fused_distance``: the largest distance between the fused run and the mean of the stock runs, as a share of
        that mean. ``stock_distance``: the largest between two stock runs, likewise. ``agrees``: whether the first is
        at most the second. ``share_within_stock``: the share of iterations at which the fused run lies between the
        least and the greatest of the stock runs. ``final_stock`` and ``final_fused``: the last means.

    Raises:
        ValueError: the stock runs do not differ, or are shorter than ``WINDOW``.
    """
    if len(fused) < WINDOW or all(losses == stock[0] for losses in stock):
        raise ValueError(f"needs runs of {WINDOW} iterations or more, of which the plain ones differ")
    runs, ours = [running_mean(losses, WINDOW) for losses in stock], running_mean(fused, WINDOW)
    means = [sum(values) / len(values) for values in zip(*runs)]

    def distance(a: Losses, b: Losses) -> float:
        return max(abs(x - y) / mean for x, y, mean in zip(a, b, means))

    fused_distance = distance(ours, means)
    stock_distance = max(distance(a, b) for a, b in combinations(runs, 2))
    within = [min(values) <= x <= max(values) for x, *values in zip(ours, *runs)]
    return dict(
        fused_distance=rounded(fused_distance),
        stock_distance=rounded(stock_distance),
        agrees=fused_distance <= stock_distance,
        share_within_stock=rounded(sum(within) / len(within)),
        final_stock=[rounded(run[-1]) for run in runs],
        final_fused=rounded(ours[-1]),
    )


def rounded(x: float) -> float:
    """Five significant digits."""
    return float(f"{x:.5g}")


def panel(title: str, stock: Sequence[Losses], fused: Losses) -> Panel:
    """The fused run's losses as a line, over a band between the least and the greatest of the stock runs."""
    runs = [running_mean(losses, WINDOW) for losses in stock]
    low, high = ([pick(values) for values in zip(*runs)] for pick in (min, max))
    series: list[Curve | Band] = [
        Band(low, high, GRAY, f"plain PyTorch, {len(runs)} runs", WINDOW),
        Curve(running_mean(fused, WINDOW), ORANGE, "fastperc", WINDOW),
    ]
    return Panel(title, series)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", type=path, required=True, metavar="IMG", help="the painting")
    parser.add_argument("--data", type=path, required=True, metavar="DIR", help="a folder of photos")
    parser.add_argument("--vgg", type=path, metavar="FILE", help="VGG-16 weights; default: fetch torchvision's")
    parser.add_argument("--out", type=path, required=True, metavar="FILE.json", help="what to write")
    add_layers(parser)
    parser.add_argument("--iterations", type=positive, default=300, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--size", type=positive, default=64, metavar="N", help="side of the crops; default: %(default)s"
    )
    parser.add_argument("--batch", type=positive, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.iterations < WINDOW:
        parser.error(f"argument --iterations: losses are averaged over {WINDOW}")
    try:
        for name in (arguments.out, arguments.out.with_suffix(".png")):
            check_writable(name)
        recipe = StyleRecipe(**recipe_fields(StyleRecipe, vars(arguments)))
        return run(recipe, arguments.out)
    except InputError as error:
        parser.error(str(error))


def run(recipe: StyleRecipe, out: Path) -> int:
    """Trains, compares and writes; returns the exit status: 1 if a fused run does not agree."""
    device = torch.device(recipe.device)
    recipe = replace(recipe, checkpoint_every=recipe.iterations)
    results, panels = {}, []
    for name, residual in RUNS.items():
        variant = with_blocks(recipe, residual)
        stock = [losses_of(variant, n if device.type == "cpu" else None, fused=False) for n in THREADS]
        fused = losses_of(variant, None, fused=True)
        numbers = compare(stock, fused)
        panels.append(panel(f"{name[0].upper()}{name[1:]}", stock, fused))
        rounded_losses = dict(stock=[[*map(rounded, losses)] for losses in stock], fused=[*map(rounded, fused)])
        results[name] = numbers | dict(losses=rounded_losses)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()), flush=True)
    with write_atomically(out) as temporary:
        temporary.write_text(as_json(description(recipe) | results) + "\n", encoding="utf-8")
    with write_atomically(out.with_suffix(".png")) as temporary:
        loss_chart(panels).quantize(64).save(temporary, optimize=True)
    return 0 if all(result["agrees"] for result in results.values()) else 1


def description(recipe: StyleRecipe) -> dict[str, Any]:
    """What was trained, with what and where."""
    fields = ("iterations", "size", "batch", "lr", "seed", "amp", "network", "style_layers", "convention")
    device = torch.device(recipe.device)
    return dict(
        commit=rows.commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=device_name(device),
        torch=torch.__version__,
        stock_threads=THREADS if device.type == "cpu" else None,
        averaged_over=WINDOW,
        style=Path(recipe.style).name,
        **{field: getattr(recipe, field) for field in fields},
    )


def as_json(content: dict[str, Any]) -> str:
    """JSON with each list of numbers on one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\n[^\[\]{}]*\]", lambda match: json.dumps(json.loads(match[0])), text)


if __name__ == "__main__":
    sys.exit(main())
