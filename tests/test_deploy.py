"""The deployment files are read by whoever runs them: flags that there are, names that agree, no root.

No image is built here, and no cluster is asked: docs/deploy.md says so.
"""

import configparser
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from vitral.cli.app import app

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of `vitral serve` as its command line takes them; raises where it would refuse one."""
    parser: Any = typer.main.get_command(app)
    assert words[:2] == ["vitral", "serve"]
    command = parser.commands["serve"]
    return command.make_context("serve", list(words[2:])).params


def instruction(name: str) -> list[str]:
    found = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(found[-1])


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["vitral"]


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())}


@pytest.fixture(scope="module")
def systemd() -> dict[str, str]:
    reader = configparser.ConfigParser(strict=False, interpolation=None)
    reader.optionxform = str  # type: ignore[assignment,method-assign]
    reader.read(ROOT / "deploy/vitral.service")
    return dict(reader["Service"])


# --- What is run ------------------------------------------------------------------------------------


def assert_guarded(options: dict[str, Any]) -> None:
    """Whoever may be reached from elsewhere asks for a token."""
    assert options["token_file"] is not None
    assert not options["insecure"]


def test_the_image_serves_the_mounted_model_to_those_with_a_token() -> None:
    options = parsed([*instruction("ENTRYPOINT"), *instruction("CMD")])
    assert_guarded(options)
    assert (options["model"], options["host"], options["port"]) == ("/model", "0.0.0.0", 8000)
    assert f"EXPOSE {options['port']}" in DOCKERFILE


def test_compose_gives_the_image_a_command_that_it_takes(compose: dict[str, Any]) -> None:
    options = parsed([*instruction("ENTRYPOINT"), *compose["command"]])
    assert_guarded(options)
    assert compose["ports"] == [f"127.0.0.1:{options['port']}:{options['port']}"]
    assert any(volume.endswith(f":{options['model']}:ro") for volume in compose["volumes"])
    assert str(options["token_file"]) == f"/run/secrets/{compose['secrets'][0]}"
    assert seconds(compose["stop_grace_period"]) > options["grace"]


def test_the_pods_get_a_command_that_the_image_takes(kubernetes: dict[str, dict[str, Any]]) -> None:
    pod = kubernetes["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = parsed([*instruction("ENTRYPOINT"), *container["args"]])
    assert_guarded(options)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/model"]["readOnly"]
    assert str(options["token_file"].parent) in mounts
    assert container["ports"][0]["containerPort"] == options["port"]
    sleeping = int(re.findall(r"sleep\((\d+)\)", str(container["lifecycle"]))[0])
    assert pod["terminationGracePeriodSeconds"] > options["grace"] + sleeping


def test_the_unit_runs_a_command_that_there_is(systemd: dict[str, str]) -> None:
    words = shlex.split(systemd["ExecStart"])
    assert Path(words[0]).name == "vitral"
    options = parsed(["vitral", *words[1:]])
    assert_guarded(options)
    assert options["host"] == "127.0.0.1"
    assert options["token_file"].name == systemd["LoadCredential"].partition(":")[0]
    assert int(systemd["TimeoutStopSec"]) > options["grace"]


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# --- How it is kept in --------------------------------------------------------------------------------


def test_nobody_is_root_or_writes(compose: dict[str, Any], kubernetes: dict[str, dict[str, Any]]) -> None:
    assert re.search(r"^USER ([1-9]\d*):([1-9]\d*)$", DOCKERFILE, re.MULTILINE)
    assert compose["user"] == "10001:10001"
    assert compose["read_only"]
    assert compose["cap_drop"] == ["ALL"]
    assert not compose.get("privileged")
    pod = kubernetes["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    inner = pod["containers"][0]["securityContext"]
    assert inner["readOnlyRootFilesystem"]
    assert not inner["allowPrivilegeEscalation"]
    assert inner["capabilities"] == {"drop": ["ALL"]}


def test_probes_ask_routes_that_need_no_token(
    compose: dict[str, Any], kubernetes: dict[str, dict[str, Any]]
) -> None:
    from vitral.ship.serve.guard import OPEN_ROUTES

    container = kubernetes["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    assert set(probes.values()) <= OPEN_ROUTES
    health = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", f"{DOCKERFILE} {compose['healthcheck']['test']}")
    assert health == ["/readyz", "/readyz"]


def test_the_health_check_of_the_image_is_python_that_compiles(compose: dict[str, Any]) -> None:
    found = re.search(r"HEALTHCHECK.*?CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert found
    for words in (json.loads(found[1]), compose["healthcheck"]["test"][1:]):
        assert words[:2] == ["python", "-c"]
        compile(words[2], "health check", "exec")


def test_pods_of_the_service_are_those_of_the_deployment(kubernetes: dict[str, dict[str, Any]]) -> None:
    labels = kubernetes["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kubernetes["Service"]["spec"]["selector"] == labels
    assert kubernetes["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert kubernetes["NetworkPolicy"]["spec"]["egress"] == []
    assert kubernetes["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


# --- What the image is built from ---------------------------------------------------------------------


def requirements() -> dict[str, str]:
    lines = (ROOT / "deploy/requirements.txt").read_text().splitlines()
    return {re.split("[<>=]", line)[0]: line for line in lines if line and not line.startswith("#")}


def test_requirements_are_those_of_the_package_but_for_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {*project["dependencies"], *project["optional-dependencies"]["serve"]}
    assert set(requirements().values()) <= known
    assert set(project["optional-dependencies"]["serve"]) <= set(requirements().values())
    assert not {"torch", "torchvision"} & set(requirements())


def test_what_is_copied_is_there_and_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert copied
    assert set(copied) == set(allowed)
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_an_artifact_is_served_with_no_more_than_the_image_has(tmp_path: Path) -> None:
    """Everything that the package needs and the image lacks is hidden; the server answers all the same."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import vitral
    from scripts import hostile
    from scripts.servers import free_port, serving
    from vitral.checkpoints.folder import Checkpoint, save_checkpoint
    from vitral.images.preprocess import Preprocess
    from vitral.model.vit import VisionTransformer

    model = VisionTransformer(32, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=3, dropout=0.0)
    save_checkpoint(tmp_path / "model", Checkpoint(model, Preprocess((32, 32)), ("ant", "bee", "cat")))
    vitral.export(str(tmp_path / "model"), tmp_path / "art", to=("onnx",))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split("[<>=]", line)[0] for line in project["dependencies"]} - set(requirements())
    modules = {"scikit-learn": "sklearn", "huggingface-hub": "huggingface_hub"}
    hidden = sorted(modules.get(name, name) for name in names)
    assert "torch" in hidden
    port = free_port()
    words = ["vitral", "serve", str(tmp_path / "art"), "--port", str(port)]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); sys.argv = {words}\n"
    code += "from vitral.__main__ import main; main()"
    with serving([sys.executable, "-c", code], port, stdout=subprocess.DEVNULL) as server:
        body = hostile.encoded(hostile.picture(), "PNG")
        status, answer = server.post("/v1/predict", body, "image/png")
        assert status == 200
        assert json.loads(answer)["predictions"][0]["label"] in ("ant", "bee", "cat")
        assert server.get("/")[0] == 200
