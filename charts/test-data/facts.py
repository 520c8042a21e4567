"""What the charts say of the programs, and of themselves, against the truth.

facts.py <repository> <values as JSON> <file for rules>

Prints a line a check, `ok` or `FAILED`. Writes the dashboard's expressions as rules, for promtool to read.
"""

import json
import re
import sys
from pathlib import Path

REPOSITORY, VALUES, RULES = map(Path, sys.argv[1:])
CHART = REPOSITORY / "charts/hauberk"

# What Prometheus and the PodMonitors add to every metric, and its histograms to theirs.
TARGET_LABELS = {"job", "node", "pod", "le"}

# Prometheus' own, and those of the collector of processes.
OTHER_METRICS = {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}

failed = False


def check(what, problems):
    global failed
    failed |= bool(problems)
    print("FAILED" if problems else "ok", what)
    for problem in problems:
        print("    " + problem)


def expressions_of_dashboard(text):
    panels = json.loads(text)["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def names_and_labels(text):
    names = set(re.findall(r"\b(?:hauberk|process)_[a-z_]+|\bup\b(?=\{)", text))
    labels = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)\s*\"", text))
    labels |= set(re.findall(r"\$labels\.(\w+)", text))
    for group in re.findall(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)", text):
        labels |= set(re.findall(r"\w+", group))
    return names, labels


def metrics_of_programs():
    text = "".join(path.read_text() for path in sorted((REPOSITORY / "telemetry/src/metrics").glob("*.rs")))
    names = set(re.findall(r'"(hauberk_[a-z_]+)"', text))
    lists = re.findall(r'\[\s*("[a-z_]+"(?:,\s*"[a-z_]+")*),?\s*\]', text)
    labels = {label for found in lists for label in re.findall(r'"([a-z_]+)"', found)}
    return names, labels


def check_metrics(what, text, names, labels):
    used_names, used_labels = names_and_labels(text)

    def known(name):
        return name in names | OTHER_METRICS or re.sub(r"_(bucket|sum|count)$", "", name) in names

    problems = [f"no program has the metric {name}" for name in sorted(used_names) if not known(name)]
    problems += [f"no metric has the label {label}" for label in sorted(used_labels - labels - TARGET_LABELS)]
    if not used_names:
        problems.append("it names no metric at all")
    check(f"{what} names metrics and labels that exist ({len(used_names)})", problems)


def write_rules(expressions):
    def plain(expression):
        return expression.replace("$__rate_interval", "5m").replace("$node", ".*")

    rules = [{"record": f"dashboard:{number}", "expr": plain(e)} for number, e in enumerate(expressions)]
    # JSON is YAML, too.
    RULES.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))


def objects_of(schema, path="values"):
    """Every schema in a schema, with where it is."""
    if isinstance(schema, dict):
        yield path, schema
        for key, value in schema.items():
            yield from objects_of(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for number, value in enumerate(schema):
            yield from objects_of(value, f"{path}/{number}")


def check_schema(schema):
    problems = []
    for path, part in objects_of(schema):
        if part.get("type") == "object" and path != "values/properties/global":
            if part.get("additionalProperties", True) is True:
                problems.append(f"{path} takes whatever it is given")
        for name, of in (part.get("properties") or {}).items():
            if isinstance(of, dict) and "description" not in of:
                problems.append(f"{path}/{name} is not described")
    check("the schema is closed, and describes everything", problems)


def leaves(schema, path=()):
    """The values that are set one by one."""
    for name, of in schema["properties"].items():
        if "properties" in of:
            yield from leaves(of, (*path, name))
        elif (*path, name) != ("global",):
            yield (*path, name)


def check_values(schema, values):
    def paths(value, known, path=()):
        if path in known or not isinstance(value, dict):
            yield path
        else:
            for name, below in value.items():
                yield from paths(below, known, (*path, name))

    known = set(leaves(schema))
    there = set(paths(values, known)) - {("global",)}
    problems = [f"values.yaml has no {'.'.join(path)}" for path in sorted(known - there)]
    problems += [f"the schema has no {'.'.join(path)}" for path in sorted(there - known)]
    check(f"schema and values.yaml have the same values ({len(known)})", problems)


def check_readme(schema, values):
    told = dict(re.findall(r"^\| `([A-Za-z.]+)` \| `(.*?)` \|", (CHART / "README.md").read_text(), re.M))
    problems = []
    for path in leaves(schema):
        name, value = ".".join(path), values
        for part in path:
            value = value[part]
        if name not in told:
            problems.append(f"README.md does not tell of {name}")
        elif json.loads(told.pop(name)) != value:
            problems.append(f"README.md has another default of {name}: it is {json.dumps(value)}")
    problems += [f"README.md tells of {name}, which there is not" for name in told]
    check("README.md tells of every value and its default", problems)


dashboard = (CHART / "dashboards/hauberk.json").read_text()
expressions = expressions_of_dashboard(dashboard)
write_rules(expressions)
names, labels = metrics_of_programs()
check_metrics("alerts.yaml", (CHART / "alerts.yaml").read_text(), names, labels)
check_metrics("the dashboard", "\n".join(expressions), names, labels)
ids = [panel["id"] for panel in json.loads(dashboard)["panels"]]
twice = {number for number in ids if ids.count(number) > 1}
check("the dashboard's panels have numbers of their own", [f"twice: {number}" for number in sorted(twice)])

schema = json.loads((CHART / "values.schema.json").read_text())
values = json.loads(VALUES.read_text())
check_schema(schema)
check_values(schema, values)
check_readme(schema, values)
sys.exit(failed)
