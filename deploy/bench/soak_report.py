"""The soak's result: its JSON, and the same as tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..demo_results import describe_environment
from ..timeline import ROUTES
from .soak_agent import FPS, SoakAgent, count_routes
from .soak_faults import Journal


def summarise(
    journal: Journal,
    agents: Sequence[SoakAgent],
    memory: list[dict[str, Any]],
    errors: Counter[str],
    *,
    uploads_checked: int,
    broken: list[str],
    seconds: float,
    seed: int,
    student: str,
) -> dict[str, Any]:
    """Args:
    errors: warnings and errors of the logs, by kind.
    uploads_checked: samples looked for in the cloud's store.
    broken: promises that did not hold.
    """
    return {
        "seconds": seconds,
        "student": student,
        "fps": FPS,
        "faults": _faults(journal),
        "operator": dict(sorted(journal.operator.items())),
        "requests_mutated": dict(sorted(journal.requests.items())),
        "agents": [_agent(agent) for agent in agents],
        "uploads_checked": uploads_checked,
        "memory": memory,
        "logged": dict(errors.most_common()),
        "broken": broken,
        "environment": describe_environment(seed),
    }


def _faults(journal: Journal) -> list[dict[str, Any]]:
    """By kind of target: how often, and seconds until the target was well again."""
    found: defaultdict[tuple[str, str], list[float | None]] = defaultdict(list)
    for _, fault, target, recovered_s in journal.faults:
        found[_kind(target), fault].append(recovered_s)
    return [
        {"target": target, "fault": fault, "count": len(times), "recovered_s": _spread(times)}
        for (target, fault), times in sorted(found.items())
    ]


def _kind(target: str) -> str:
    if target in ("cloud", "operator", "requests"):
        return target
    return "link" if target.startswith("link") else "agent"


def _spread(times: list[float | None]) -> dict[str, float] | None:
    known = [seconds for seconds in times if seconds is not None]
    return {"median": round(float(np.median(known)), 1), "max": round(max(known), 1)} if known else None


def _agent(agent: SoakAgent) -> dict[str, Any]:
    spec, legs = agent.spec, agent.legs
    damaged, routes = spec.stream.damaged, count_routes(legs)
    killed = [leg for leg in legs if leg.killed_at_s is not None]
    others = [leg for leg in legs if leg.killed_at_s is None]
    return {
        "agent": spec.name,
        "device_id": spec.device_id,
        "environment": spec.stream.environment,
        "upload": spec.upload,
        "processes": len(legs),
        "killed": len(killed),
        "stopped": sum(leg.stopped for leg in legs),
        "answered": {"total": routes.total(), **{route: routes[route] for route in ROUTES}},
        "reasons": dict(Counter(answer.reason for leg in legs for answer in leg.answers).most_common()),
        "lost": sum(leg.missing(damaged) for leg in others),
        "duplicates": sum(leg.duplicates for leg in legs),
        "under_way_when_killed": sum(leg.missing(damaged) for leg in killed),
        "unreadable": sum(leg.unreadable for leg in legs),
        "longest_gap_s": round(max(leg.longest_gap_s() for leg in legs), 1),
        "student_versions": sorted({answer.version for leg in legs for answer in leg.answers}),
        "refused": sum(len(leg.summary["refused"]) for leg in legs if leg.summary),
        "uploads_dropped": sum(leg.summary["uploads_dropped"] for leg in legs if leg.summary),
        "bytes_up": agent.link.carried_bytes[0],
        "bytes_down": agent.link.carried_bytes[1],
    }


def show(result: dict[str, Any], console: Console) -> None:
    for table in (_fault_table(result), _agent_table(result), _memory_table(result), _count_table(result)):
        console.print(table)
    console.print(f"{result['uploads_checked']} samples that were to be uploaded were looked for in the cloud's store.")
    for promise in result["broken"]:
        console.print(f"BROKEN: {promise}", highlight=False, markup=False, style="red")
    if not result["broken"]:
        console.print("Every promise held.")


def _table(title: str, headings: str, rows: Sequence[Sequence[object]]) -> Table:
    table = Table(title=title)
    for number, heading in enumerate(headings.split("|")):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _fault_table(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["faults"]:
        spread = row["recovered_s"]
        outcome = f"{spread['median']} s, at most {spread['max']} s" if spread else "-"
        rows.append((f"{row['target']}: {row['fault']}", row["count"], outcome))
    rows += [(f"operator: {act}", count, "-") for act, count in result["operator"].items()]
    return _table(f"Faults in {result['seconds']:.0f} s", "fault|how often|well again after (median)", rows)


def _agent_table(result: dict[str, Any]) -> Table:
    rows = [
        (
            row["agent"],
            row["processes"],
            row["killed"],
            *row["answered"].values(),
            row["lost"],
            row["duplicates"],
            row["under_way_when_killed"],
            row["longest_gap_s"],
        )
        for row in result["agents"]
    ]
    headings = f"agent|runs|killed|answers|{'|'.join(ROUTES)}|lost|twice|cut off|gap, s"
    return _table("Answers", headings, rows)


def _memory_table(result: dict[str, Any]) -> Table:
    rows = [tuple(row.values()) for row in result["memory"]]
    return _table("Resident memory, MB", "process|lives|longest, s|its start|its end|highest", rows)


def _count_table(result: dict[str, Any]) -> Table:
    counted = {**result["logged"], **{f"mutated {what}": n for what, n in result["requests_mutated"].items()}}
    return _table("Logged, and mutated requests answered", "what|how often", list(counted.items()))
