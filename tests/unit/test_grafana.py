# SPDX-License-Identifier: Apache-2.0
"""The dashboard asks for metrics that there are, and Grafana can place its panels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import vllm.v1.metrics.loggers
import vllm.v1.spec_decode.metrics
from prometheus_client import REGISTRY

from vllm_medusa import metrics
from vllm_medusa.runner import budget_report

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples" / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
COLUMNS = 24
BUILT_IN = {"__rate_interval", "__range"}
SUFFIX = re.compile(r"_(total|bucket|sum|count)$")
METRIC = re.compile(r"\b(?:vllm|medusa):\w+")

of_each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']} {panel['title']}")


def queries(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def strings(value: Any) -> Iterator[str]:
    """All strings of the dashboard."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def known_metrics() -> dict[str, tuple[str, ...]]:
    """The plugin's metrics with their labels, and vLLM's, of which only the names are looked at."""
    metrics._families()
    budget_report._families()
    own = {name: collector for collector, names in REGISTRY._collector_to_names.items() for name in names}
    known = {name: each._labelnames for name, each in own.items() if name.startswith("medusa:")}
    for module in (vllm.v1.metrics.loggers, vllm.v1.spec_decode.metrics):
        source = Path(str(module.__file__)).read_text()
        known |= dict.fromkeys(re.findall(r'"(vllm:\w+)"', source), ("model_name", "engine"))
    return known


def test_every_metric_exists_and_has_the_labels_that_are_asked_for() -> None:
    known = known_metrics()
    asked = [query for panel in PANELS for query in queries(panel)]
    asked += [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]
    assert len(asked) > len(PANELS)
    for query in asked:
        found = METRIC.findall(query)
        assert found, query
        labels = {label for each in found for label in (*known[SUFFIX.sub("", each)], "le")}
        by = re.findall(r"by \((\w+)\)|label_values\([\w:]+, (\w+)\)", query)
        assert {first or second for first, second in by} | set(re.findall(r"(\w+)=~", query)) <= labels, query


def test_every_metric_of_the_plugin_is_shown() -> None:
    shown = {SUFFIX.sub("", each) for panel in PANELS for query in queries(panel) for each in METRIC.findall(query)}
    own = {SUFFIX.sub("", each) for each in known_metrics() if each.startswith("medusa:")}
    assert {each for each in own if not each.endswith("_created")} <= shown


def test_a_name_that_is_no_metric_is_found_out() -> None:
    assert "vllm:spec_decode_num_drafts" in known_metrics()
    assert not {"vllm:spec_decode_num_trees", "medusa:trees"} & set(known_metrics())


@of_each_panel
def test_a_panel_has_what_grafana_needs(panel: dict[str, Any]) -> None:
    assert panel["type"] in {"stat", "timeseries", "table"}
    assert panel["title"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references)) > 0
    for query in queries(panel):
        assert all(query.count(opening) == query.count(closing) for opening, closing in ("()", "[]", "{}"))
    place = panel["gridPos"]
    assert 0 <= place["x"] < place["x"] + place["w"] <= COLUMNS


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        apart = [
            one[axis] + one[size] <= other[axis] or other[axis] + other[size] <= one[axis]
            for axis, size in (("x", "w"), ("y", "h"))
        ]
        assert any(apart)


def test_every_variable_is_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for text in strings(PANELS) for name in re.findall(r"\$\{?(\w+)", text)}
    assert used - BUILT_IN == defined
