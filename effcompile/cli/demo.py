"""Run the main job on real weights and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from effcompile.cli import parameters as given
from effcompile.cli.console import bad, dim, good, print_json, progress, stderr, stdout, table

MODEL = "smollm2-135m"
LENGTHS = (1024, 2048)
LONG = (4096, 8192)
QUICK = (512,)

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder for the picture, the pages and the figures.")]
Quick = Annotated[bool, typer.Option("--quick", help="512 tokens only.")]
Long = Annotated[bool, typer.Option("--long", help="4096 and 8192 tokens as well.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed calls of every arm at every length.")]


def demo(
    out: Out = Path("demo-out"),
    quick: Quick = False,
    long: Long = False,
    rounds: Rounds = 3,
    as_json: given.AsJson = False,
) -> int:
    """Run SmolLM2-135M on real text through eager, TorchInductor and eff: same text, same rounds, arms taking turns.

    Perplexity comes from the logits of the timed calls. Exit code 1 where the arms' perplexities differ by over 0.1 %.
    """
    from effcompile.demo import page
    from effcompile.demo.measure import Job, measure, real_windows
    from effcompile.demo.picture import draw
    from effcompile.models import zoo
    from effcompile.models.trained import require

    for package in ("psutil", "matplotlib"):  # before minutes of work, not after them
        require(package, "demo")
    entry = zoo.find(MODEL)
    lengths = QUICK if quick else (*LENGTHS, *(LONG if long else ()))
    with progress("fetching weights and text", quiet=as_json):
        assert entry.tokenizer is not None
        windows, text, remarks = real_windows(entry.tokenizer(), lengths, rounds)
    for line in remarks:
        stderr().print(line, style="yellow", markup=False, soft_wrap=True)
    with progress("explaining", quiet=as_json):
        explanation = _explain(lengths[-1])
    job = Job(entry.name, windows, text, f"{entry.summary}; {entry.source}", remarks=remarks)
    with progress("measuring", job.steps, quiet=as_json) as step:
        results = measure(job, step)
    out.mkdir(parents=True, exist_ok=True)
    draw(results, out / "demo.png")
    links = [
        ("explain.html", f"Every decision and its reason at {lengths[-1]} tokens"),
        ("results.json", "All figures"),
    ]
    (out / "report.html").write_text(page.page(results, out / "demo.png", links), encoding="utf-8")
    (out / "explain.html").write_text(explanation.to_html(), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results.to_json(), indent=1), encoding="utf-8")
    if as_json:
        print_json(results.to_json())
    else:
        _show(results, out)
    return 0 if results.agreed else 1


def _explain(length: int) -> Any:
    from effcompile.cli.models import load_model
    from effcompile.explaining import explain

    word = f"zoo:{MODEL}"
    loaded = load_model(word, {"seq": length}, None, real=False)
    return explain(
        loaded.model, *loaded.args, name=word, command=f"eff explain {word} --shape s={length}", **loaded.kwargs
    )


def _show(results: Any, out: Path) -> None:
    from effcompile.demo.page import MEASURED, SITES, circumstances, measured, sites
    from effcompile.demo.results import notes

    console = stdout()
    console.print(table(f"{results.model}: {results.text}", MEASURED, measured(results), right=MEASURED[2:]))
    console.print()
    console.print((good if results.agreed else bad)(results.verdict()), soft_wrap=True)
    for line in results.noise():
        console.print(bad(f"Noisy: {line}; take the timings with care."), soft_wrap=True)
    console.print()
    console.print(table("Attention sites in the eff arm", SITES, sites(results)))
    for note in notes(results.report):
        console.print(dim(f"  {note}"), soft_wrap=True)
    console.print()
    console.print(table("Measured on", ("", ""), circumstances(results)))
    console.print()
    console.print(
        f"wrote {', '.join(str(out / name) for name in ('report.html', 'explain.html', 'demo.png', 'results.json'))}"
    )
