"""rlft verify: check every online algorithm against exact answers; exit code 1 if one of them is wrong."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rlft.cli.parser import Parser, output_directory
from rlft.core.errors import ConfigError

EXIT_WRONG = 1
WIDTH = 150  # of the table, if standard output is not a terminal


def parser() -> Parser:
    verify = Parser("verify", __doc__, examples=("rlft verify", "rlft verify --only grpo kl --out outputs/verify"))
    verify.add_argument("--out", type=Path, default=Path("outputs/verify"), help="where to write tables and plot")
    verify.add_argument("--only", nargs="+", default=[], metavar="NAME", help="algorithms (grpo) or parts (kl)")
    return verify


def run(arguments: list[str]) -> int:
    args = parser().parse(arguments)
    out = output_directory(args.out)
    import torch
    from rich.console import Console

    try:
        from rlft.verify import page
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'rlft[plots]'") from error
    from rlft.verify.runner import verify

    torch.set_num_threads(1)  # the tensors are tiny: more threads are slower
    console, started = Console(width=None if sys.stdout.isatty() else WIDTH), time.perf_counter()
    with console.status("verifying") as status:
        findings = verify(args.only, started=lambda name: status.update(f"verifying {name}"))
    seconds = time.perf_counter() - started
    console.print(page.table(findings.rows))
    page.write_json(findings.rows, findings.trained, out / "verify.json", seconds=seconds)
    page.write_markdown(findings.rows, out / "verify.md", seconds=seconds)
    written = f"{out / 'verify.md'}, {out / 'verify.json'}"
    if findings.trained:
        page.draw(findings.trained, out / "frontier.png")
        written += f", {out / 'frontier.png'}"
    wrong = [row for row in findings.rows if not row.is_right]
    console.print(f"{len(findings.rows) - len(wrong)} of {len(findings.rows)} rows pass, {seconds:.0f} s; {written}")
    for row in wrong:
        print(f"rlft: {row.algorithm}: {row.claim}: measured {row.measured:.6g}", file=sys.stderr)
    return EXIT_WRONG if wrong else 0
