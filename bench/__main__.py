"""`python -m bench`: throughput, accuracy, bytes moved, instructions and compiled code of every operation."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from bench import ROOT, operations


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("operation", nargs="*", help="such as layer_norm; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--quick", action="store_true", help="two sizes, a fifth of the time on each")
    parser.add_argument("--seconds", type=float, help="spent on each contestant and row; default: 1, or 0.2 if quick")
    parser.add_argument("--json", type=Path, metavar="F", help="write every figure to this file")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw the achieved bandwidths into this PNG")
    parser.add_argument("--record", action="store_true", help="write bench/results/<device>/<operation>.json")
    parser.add_argument(
        "--system-heap", action="store_true", help="leave the heap as it is: large results then cost page faults"
    )
    parser.add_argument("--accuracy", action="store_true", help="errors against float64 instead of times")
    parser.add_argument("--traffic", action="store_true", help="bytes that the Triton kernels load and store")
    parser.add_argument("--static", action="store_true", help="registers, spills, vector widths of compiled GPU code")
    parser.add_argument("--instructions", action="store_true", help="instructions of one CPU call, under valgrind")
    parser.add_argument("--report", action="store_true", help="write the README's table and docs/benchmarks.md")
    return parser.parse_args()


def gpu_code(stems: list[str], moved: bool, compiled: bool) -> None:
    """What can be said of GPU kernels without a GPU. Imported here: it needs Triton or nvcc, which figures do not."""
    if moved:
        from bench import traffic

        traffic.report(stems)
    if compiled:
        subprocess.run([sys.executable, "-m", "bench.aot", *stems], cwd=ROOT, check=True)
        from bench import static

        static.report()


def main() -> None:
    args = arguments()
    if args.traffic or args.static:
        return gpu_code(list(operations(args.operation)), args.traffic, args.static)

    if args.instructions:
        from bench import instructions

        return instructions.report(list(operations(args.operation)), args.quick)

    from bench import report, run, timing
    from bench.accuracy import errors, measure

    if args.report:
        return report.report()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: torch finds no GPU")
    if not args.system_heap:
        timing.keep_freed_memory()
    # Several processes on one GPU would measure who waits for whom.
    chosen = operations(args.operation, processes=device == "cpu" and not args.accuracy)
    print(f"{report.device_name(device)}, torch {torch.__version__}, revision {report.revision()}\n")

    seconds = args.seconds or (0.2 if args.quick else 1.0)
    rows, wrong, failed = [], [], []

    def keep() -> None:
        if args.json:
            report.write_json(args.json, report.document(device, rows, wrong, args.system_heap, seconds))

    if args.accuracy:
        dtypes = (torch.float32, torch.bfloat16)
        with report.progress(len(chosen) * len(dtypes), "accuracy") as bar:
            for operation in chosen.values():
                mine = []
                for dtype in dtypes:
                    mine += errors(operation, dtype, device)
                    bar.advance(bar.task_ids[0])
                report.show(f"{operation.stem}: {measure(operation.stem)}", *report.accuracy_columns(mine))
                wrong += mine
    else:
        if why := run.can_compile(device):
            print(why)
        with report.progress(sum(len(run.plan(op, args.quick)) for op in chosen.values()), "throughput") as bar:
            for operation in chosen.values():
                mine = []
                for dtype, size, mode in run.plan(operation, args.quick):
                    bar.update(bar.task_ids[0], description=f"{operation.stem} {mode} {report.size(size)}")
                    try:
                        mine.append(run.measure(operation, mode, size, dtype, device, seconds))
                    except Exception as error:  # a wrong row is not timed, and costs no other row its time
                        failed.append(f"{operation.stem} {mode} {report.size(size)} {dtype}: {error!r}")
                        print(failed[-1], file=sys.stderr)
                    else:
                        rows.append(mine[-1])
                        keep()  # whatever ends a run leaves what it has measured
                    bar.advance(bar.task_ids[0])
                if mine:
                    report.show(f"{operation.stem} against {report.counterpart(operation)}", *report.columns(mine))
    keep()
    if args.plot and rows:
        report.plot(args.plot, rows, report.device_name(device))
    if failed:
        raise SystemExit(f"bench: {len(failed)} rows failed, and nothing is recorded; the last: {failed[-1]}")
    if args.record:
        for path in report.record(device, rows, wrong, args.system_heap, seconds):
            print(f"wrote {path.relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
