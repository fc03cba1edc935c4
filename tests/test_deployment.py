"""What deploys the command: every file says what its tool understands, and all of them speak of the same versions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import cli as ray

from tests.commands import calls, parse

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
RAYJOB = ROOT / "docker" / "kuberay-rayjob.yaml"
CRONJOB = ROOT / "docker" / "cronjob.yaml"
SBATCH = ROOT / "recipes" / "slurm" / "filter.sbatch"
DEPLOYMENTS = [DOCKERFILE, COMPOSE, RAYJOB, CRONJOB, SBATCH]

PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def instructions(name: str) -> list[str]:
    """What follows an instruction of the Dockerfile, each time."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)).splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))


def nodes(tree: Any) -> Iterator[Any]:
    """Everything inside a YAML document, itself included."""
    yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(child)


def arguments_of(program: str, path: Path) -> list[list[str]]:
    """The arguments of every call of `program` in a file, those of the indented examples in its comments included."""
    text = path.read_text()
    shell = re.findall(r"^#   (.*)$", text, re.MULTILINE)
    lists: list[list[str]] = []
    if path.suffix == ".yaml":
        inside = list(nodes(yaml.safe_load(text)))
        shell += [node for node in inside if isinstance(node, str)]
        lists = [node[1:] for node in inside if isinstance(node, list) and node[:1] == [program]]
        if program == "ray":
            params = [node["rayStartParams"] for node in inside if isinstance(node, dict) and "rayStartParams" in node]
            lists += [["start", *(f"--{name}={value}" for name, value in given.items())] for given in params]
    elif path == DOCKERFILE:
        shell += instructions("RUN")
    else:
        shell.append(text)
    return [*(call for text in shell for call in calls(program, text)), *lists]


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda p: p.name)
def test_each_file_calls_the_filter_by_options_that_it_has(path: Path) -> None:
    lines = arguments_of("sqsd-filter", path)
    assert lines
    assert all(parse(line).params["drop_top"] for line in lines)


@pytest.mark.parametrize("path", [COMPOSE, RAYJOB, SBATCH], ids=lambda p: p.name)
def test_ray_is_started_by_options_that_it_has(path: Path) -> None:
    lines = arguments_of("ray", path)
    assert lines
    for line in lines:
        parsed = parse(line, click.Context(ray), None)
        if line[0] == "symmetric-run":  # hands on to `ray start` what it doesn't know itself
            own = parse(line[: line.index("--")], click.Context(ray), None)
            parsed = parse(["start", *own.params["ray_args_and_entrypoint"]], click.Context(ray), None)
        assert parsed.params is not None


def test_the_environment_sets_options_that_the_filter_has(monkeypatch: pytest.MonkeyPatch) -> None:
    head = yaml.safe_load(COMPOSE.read_text())["services"]["head"]
    given = {k: v for k, v in head["environment"].items() if k.startswith("SQSD_FILTER_")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    parsed = parse(["in.jsonl", "out"])
    assert given.keys() <= {p.envvar for p in parsed.command.params if hasattr(p, "envvar")}
    assert (parsed.params["engine"], parsed.params["ray_address"]) == ("ray", "auto")


def test_the_compose_file_is_one() -> None:
    run = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    checked = subprocess.run(run, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_a_night_never_meets_the_next_one_nor_midnight() -> None:
    spec = yaml.safe_load(CRONJOB.read_text())["spec"]
    assert (spec["concurrencyPolicy"], spec["timeZone"]) == ("Forbid", "Etc/UTC")
    minute, hour = (int(field) for field in spec["schedule"].split()[:2])
    latest = spec["startingDeadlineSeconds"] + spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert (hour * 60 + minute) * 60 + latest < 24 * 3600  # the destination's date stays the same


def refused(manifest: dict[str, Any]) -> str:
    """What Kubernetes has against a manifest, or nothing."""
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as problem:
        return str(problem)
    return ""


def test_the_cron_job_is_what_kubernetes_takes() -> None:
    job = yaml.safe_load(CRONJOB.read_text())
    assert refused(job) == ""
    job["spec"]["schedul"] = job["spec"].pop("schedule")
    assert "schedul" in refused(job)


def template(content: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "template": content}


def pods() -> dict[str, dict[str, Any]]:
    cluster = yaml.safe_load(RAYJOB.read_text())["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    return {name: group["template"] for name, group in groups.items()}


def exactly(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


WHOLE = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
GROUP = {"rayStartParams": TEXTS, "template": {"type": "object"}}
CLUSTER = exactly(
    {
        "headGroupSpec": exactly(GROUP),
        "workerGroupSpecs": {
            "type": "array",
            "items": exactly(
                GROUP | {"groupName": {"type": "string"}, "replicas": WHOLE, "minReplicas": WHOLE, "maxReplicas": WHOLE}
            ),
        },
    },
    rayVersion={"type": "string"},
    authOptions=exactly({"mode": {"enum": ["token"]}}),
)
JOB = exactly(
    {"entrypoint": {"type": "string"}, "rayClusterSpec": CLUSTER},
    backoffLimit=WHOLE,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=WHOLE,
)


def test_the_ray_job_has_fields_that_kuberay_knows_and_pods_that_kubernetes_takes() -> None:
    job = yaml.safe_load(RAYJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    jsonschema.validate(job["spec"], JOB)
    assert {name: refused(template(pod)) for name, pod in pods().items()} == {"head": "", "gpu": ""}


def lint(*command: str, given: str | None = None) -> None:
    program = Path(sys.executable).with_name(command[0])
    run = subprocess.run([program, *command[1:]], input=given, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_dockerfile_is_clean_and_leaves_root() -> None:
    lint("hadolint", "--no-color", str(DOCKERFILE))
    assert instructions("USER")[-1].partition(":")[0] not in ("root", "0")
    assert json.loads(instructions("ENTRYPOINT")[-1]) == ["sqsd-filter"]


@pytest.mark.parametrize("path", [SBATCH, ROOT / "tests" / "run", ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_the_shell_scripts_are_clean(path: Path) -> None:
    lint("shellcheck", str(path))


def test_the_cron_jobs_script_is_clean() -> None:
    (container,) = pod_of(CRONJOB)["containers"]
    assert container["command"] == ["/bin/bash", "-c"]
    lint("shellcheck", "--shell=bash", "-", given=container["args"][0])


def pod_of(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load(path.read_text())["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return spec


def test_all_files_name_the_pinned_ray_and_one_image() -> None:
    (base,) = instructions("FROM")
    assert re.fullmatch(rf"rayproject/ray:{re.escape(PINNED['ray'])}-py3\d+-cu\d+", base)
    trees = {path: list(nodes(yaml.safe_load(path.read_text()))) for path in (COMPOSE, RAYJOB, CRONJOB)}
    (ray_version,) = (n["rayVersion"] for n in trees[RAYJOB] if isinstance(n, dict) and "rayVersion" in n)
    assert ray_version == PINNED["ray"]
    for inside in trees.values():
        assert {n["image"] for n in inside if isinstance(n, dict) and "image" in n} == {f"sqsd-filter:{VERSION}"}
    assert f" -t sqsd-filter:{VERSION} " in DOCKERFILE.read_text()


def test_the_image_gets_what_it_copies() -> None:
    copied = [source for line in instructions("COPY") for source in line.split()[1:-1]]
    let_in = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{source}" for source in copied} == {line for line in let_in if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


def test_only_the_head_sees_the_data_and_all_keep_models_where_the_image_looks_for_them() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    mounted = {name: [v.rpartition(":")[2] for v in service["volumes"]] for name, service in services.items()}
    ray_pods = {f"ray {name}": pod["spec"] for name, pod in pods().items()}
    for name, pod in (ray_pods | {"nightly": pod_of(CRONJOB)}).items():
        mounted[name] = [m["mountPath"] for c in pod["containers"] for m in c["volumeMounts"]]
    assert {name for name, paths in mounted.items() if "/data" in paths} == {"head", "ray head", "nightly"}
    assert [name for name, paths in mounted.items() if environment()["HF_HOME"] not in paths] == []


def test_what_scores_asks_for_gpus() -> None:
    (devices,) = (
        n["devices"] for n in nodes(yaml.safe_load(COMPOSE.read_text())["services"]["worker"])
        if isinstance(n, dict) and "devices" in n
    )  # fmt: skip
    assert devices[0]["capabilities"] == ["gpu"]
    for pod in (pods()["gpu"]["spec"], pod_of(CRONJOB)):
        assert all(int(c["resources"]["limits"]["nvidia.com/gpu"]) for c in pod["containers"])
    assert "#SBATCH --gpus-per-node=" in SBATCH.read_text()
