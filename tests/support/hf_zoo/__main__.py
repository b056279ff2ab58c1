"""Print, or record with --accept, how many graphs and breaks plain Dynamo has for every call of the matrix."""

from __future__ import annotations

import argparse

from tests.support.hf_zoo.catalog import cases
from tests.support.hf_zoo.dynamo import trace_call
from tests.support.hf_zoo.golden import PATH, Counts, accept, recorded, torch_minor


def main() -> int:
    """Measure the cases named, all without a name; return 1 when they differ from the record and are not accepted."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.hf_zoo", description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases; all when absent")
    parser.add_argument("--accept", action="store_true", help=f"write {PATH.name}")
    options = parser.parse_args()
    unknown = set(options.cases) - {case.name for case in cases()}
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in cases())}")

    before = recorded() or {}
    counts: Counts = {}
    for case in cases():
        if options.cases and case.name not in options.cases:
            continue
        module = case.build()
        counts[case.name] = {}
        for call in case.calls:
            trace = trace_call(module, case, call)
            counts[case.name][call.name] = {"graphs": trace.graphs, "breaks": trace.breaks}
            known = before.get(case.name, {}).get(call.name)
            mark = "" if known == counts[case.name][call.name] else f"   was {known}"
            print(f"{case.name:14} {call.name:18} graphs {trace.graphs}  breaks {trace.breaks}{mark}", flush=True)

    if options.accept:
        changed = accept({**before, **counts} if options.cases else counts)
        print(f"torch {torch_minor()}: {PATH.name} {'written' if changed else 'was already so'}")
        return 0
    return int(any(before.get(name) != calls for name, calls in counts.items()))


if __name__ == "__main__":
    raise SystemExit(main())
