"""`python -m tests.benchmarks`: everything that this package promises about speed and disk, measured on this machine.

Each alternative does the same work in the same run, in alternating order. The suite reports; it never fails because a
target was missed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.benchmarks import machine, pictures, report
from tests.benchmarks.alternatives import ALL
from tests.benchmarks.bench import Bench, Options
from tests.benchmarks.host import prepared
from tests.benchmarks.measure import BenchmarkError, Result
from tests.benchmarks.measures import MEASURES
from tests.benchmarks.projects import SIZES


def main() -> int:
    """Run the measures that were asked for."""
    arguments = _parser().parse_args()
    if arguments.list:
        for name, measure in MEASURES.items():
            print(f"{name:16} {(measure.__doc__ or '').splitlines()[0]}")
        return 0
    if arguments.draw:
        print(*pictures.draw_file(arguments.draw, arguments.pictures or Path.cwd()), sep="\n")
        print("", *pictures.bars(json.loads(arguments.draw.read_text("utf-8"))), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, _end)
    # A shell that started us in the background would have our children ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted: everything that was started is gone", file=sys.stderr)
        return 130
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    chosen = arguments.only or list(MEASURES)
    ways = tuple(arguments.way or ())
    options = Options(
        arguments.project, arguments.repetitions, arguments.patience, arguments.smoke, arguments.clusters, ways
    )
    results: list[Result] = []
    with prepared(arguments.dir, arguments.uv_cache, smoke=arguments.smoke) as host, ExitStack() as stack:
        places = {"disk": host.disk} | ({"other": host.other} if host.other else {})
        about = machine.describe(places)
        print(*machine.lines(about), sep="\n", flush=True)
        bench = Bench(host, options, stack)
        for name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            result = Result(name)
            with bench.timed(result):
                MEASURES[name](bench, result)
            results.append(result)
            print(report.table(result), flush=True)
            if arguments.json:
                # After each measure: an interrupted run keeps what it has.
                report.write(arguments.json, about, {**asdict(options), "measures": chosen}, results)
    if arguments.json and arguments.pictures:
        print(*pictures.draw_file(arguments.json, arguments.pictures), sep="\n")
    return 1 if any(result.failures for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", metavar="MEASURE", choices=list(MEASURES), help="may be repeated")
    parser.add_argument("--project", choices=list(SIZES), default="medium", help="default: medium")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--patience",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="what takes longer in all is not repeated further (default: 300)",
    )
    parser.add_argument("--clusters", type=int, default=8, metavar="N", help="at most so many at once (default: 8)")
    parser.add_argument(
        "--way",
        action="append",
        metavar="LETTER",
        choices=[one.letter for one in ALL],
        help="of the alternatives that one cluster has only this; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, samples and rows there")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="with --json or --draw: write SVG pictures there"
    )
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="only draw the pictures of an earlier run's JSON, as text too"
    )
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help=f"a short path on a disk (default: {tempfile.gettempdir()})"
    )
    parser.add_argument("--uv-cache", type=Path, metavar="DIR", help="a uv cache to use and keep, on the same disk")
    parser.add_argument("--smoke", action="store_true", help="tiny and once: only shows that everything runs")
    parser.add_argument("--list", action="store_true", help="list the measures")
    return parser


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
