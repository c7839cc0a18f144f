"""The files in examples/deploy agree with the server's options and with each other; check.py there runs them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from serving import lstm, running

from cellstack.cli.main import parser
from cellstack.serve.app import OPEN_PATHS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"


def text_of(name):
    return (DEPLOY / name).read_text(encoding="utf-8")


def options(arguments):
    return parser().parse_args(["serve", *arguments])


def image():
    """The Dockerfile's instructions of the last stage, those in JSON parsed."""
    stage = text_of("Dockerfile").split("\nFROM ")[-1].replace("\\\n", " ")
    found = re.findall(r"^(USER|EXPOSE|ENTRYPOINT|CMD) (.+)$", stage, re.MULTILINE)
    check = re.search(r"^HEALTHCHECK .*?CMD (.+)$", stage, re.MULTILINE)
    return {
        name: json.loads(value) if value[0] == "[" else value for name, value in [*found, ("HEALTHCHECK", check[1])]
    }


def pod():
    deployment = list(yaml.safe_load_all(text_of("kubernetes.yaml")))[-1]
    return deployment["spec"]["template"]["spec"]


def test_docs_link_every_file():
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    for path in DEPLOY.iterdir():
        if path.is_file():
            assert f"examples/deploy/{path.name}" in page


def test_the_unit_s_command():
    unit = text_of("cellstack@.service")
    command = re.search(r"^ExecStart=/opt/cellstack/%i/bin/cellstack serve (.+)$", unit, re.MULTILINE)[1]
    folder = re.search(r"^StateDirectory=(.+)$", unit, re.MULTILINE)[1]
    found = options(command.split())
    assert found.durable == f"/var/lib/{folder}"
    assert int(re.search(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)[1]) > found.connections


def test_the_image_and_the_pod():
    made, spec = image(), pod()
    (container,) = spec["containers"]
    assert made["ENTRYPOINT"][:2] == ["cellstack", "serve"]
    found = options([*made["ENTRYPOINT"][2:], *container["args"]])
    assert found.host == "0.0.0.0"
    assert container["volumeMounts"][0]["mountPath"] == found.durable
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == int(made["USER"])
    assert str(found.port) in made["EXPOSE"].split()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]["httpGet"]
        assert probe["port"] == container["ports"][0]["containerPort"] == found.port
        assert probe["path"] in OPEN_PATHS  # probes send no token


def test_the_image_s_health_check(tmp_path):
    python, option, code = image()["HEALTHCHECK"]
    assert (python, option) == ("python", "-c")
    lstm().save(tmp_path / "lstm.safetensors")
    with running(tmp_path / "lstm.safetensors", tokens=("secret",)) as served:
        code = code.replace("127.0.0.1:8080", f"127.0.0.1:{served.port}")
        exec(code, {})
        served.server.ready = False
        with pytest.raises(OSError, match="503"):
            exec(code, {})


def test_nginx_passes_on_what_the_server_accepts():
    site, found = text_of("nginx.conf"), options(["model"])
    assert f"proxy_pass http://127.0.0.1:{found.port};" in site
    assert f"client_max_body_size {found.message >> 20}m;" in site
