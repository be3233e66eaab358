"""python -m rlft verify: check every algorithm against exact answers; exit code 1 when one of them is wrong."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rlft.errors import RlftError

EXIT_WRONG = 1
WIDTH = 150  # of the table, where standard output is no terminal


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser(
        "verify", help="every algorithm against exact answers, on tasks that can be enumerated: 3 minutes on one core"
    )
    verify.add_argument(
        "--out", type=Path, default=Path("outputs/verify"), help="directory of verify.md, verify.json, frontier.png"
    )
    verify.add_argument("--only", nargs="+", default=[], metavar="NAME", help="algorithms (grpo), or parts (kl)")
    args = parser.parse_args(arguments)
    try:
        return _verify(args.out, args.only)
    except RlftError as error:
        print(f"rlft: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _verify(out: Path, only: list[str]) -> int:
    import torch
    from rich.console import Console

    try:
        from rlft.verify import report
    except ImportError as error:
        print(f"rlft: {error}: pip install 'rlft[plots]'", file=sys.stderr)
        return 2
    from rlft.verify.run import verify

    torch.set_num_threads(1)  # tables are tiny: threads would wait for each other
    console, started = Console(width=None if sys.stdout.isatty() else WIDTH), time.perf_counter()
    with console.status("verifying") as status:
        findings = verify(only, started=lambda name: status.update(f"verifying {name}"))
    seconds = time.perf_counter() - started
    console.print(report.table(findings.rows))
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(findings.rows, findings.trained, out / "verify.json", seconds=seconds)
    report.write_markdown(findings.rows, out / "verify.md", seconds=seconds)
    written = f"{out / 'verify.md'}, {out / 'verify.json'}"
    if findings.trained:
        report.draw(findings.trained, out / "frontier.png")
        written += f", {out / 'frontier.png'}"
    wrong = [row for row in findings.rows if not row.is_right]
    console.print(f"{len(findings.rows) - len(wrong)} of {len(findings.rows)} rows pass, {seconds:.0f} s; {written}")
    for row in wrong:
        print(f"rlft: {row.algorithm}: {row.claim}: measured {row.measured:.6g}", file=sys.stderr)
    return EXIT_WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
