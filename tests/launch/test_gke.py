"""launch/gke_*.yaml: valid for Kubernetes and JobSet, chips that add up, exit codes as the command gives them."""

import copy
import math
from pathlib import Path

import pytest

from aegis_jax import cli
from aegis_jax.run.asked import settings

LAUNCH = Path(__file__).parent.parent.parent / "launch"
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is in the extra dev")
jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

KUBERNETES = "1.33"  # the first in which backoffLimitPerIndex is stable
# Of JobSet's v1alpha2 (v0.12.0): the fields that we use, and no others. The Jobs within are Kubernetes' to check.
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 20}
_ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]


def _object(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


JOBSET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(["name"], name={"type": "string", "maxLength": 40}, annotations={"type": "object"}),
    spec=_object(
        ["replicatedJobs"],
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
        network=_object(enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}),
        failurePolicy=_object(
            maxRestarts={"type": "integer", "minimum": 0},
            rules={
                "type": "array",
                "items": _object(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": _ACTIONS},
                    onJobFailureReasons={
                        **_TEXTS,
                        "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]},
                    },
                    onJobFailureMessagePatterns=_TEXTS,
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name", "template"],
                name={"type": "string"},
                replicas={"type": "integer", "minimum": 1},
                template={"type": "object", "required": ["spec"]},
            ),
        },
    ),
)


def load(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def jobs(document):
    """The Kubernetes Jobs of a document, each as if it stood alone."""
    if document["kind"] == "Job":
        return [document]
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        for job in document["spec"]["replicatedJobs"]
    ]


def pod(job):
    return job["spec"]["template"]["spec"]


def container(job):
    (only,) = pod(job)["containers"]
    return only


def chips(job):
    return math.prod(map(int, pod(job)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))


@pytest.mark.parametrize("name", ["gke_batch.yaml", "gke_jobset.yaml"])
def test_valid_for_kubernetes(name):
    for job in jobs(load(name)):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
        wrong = copy.deepcopy(job)
        wrong["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] = ["2"]
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_valid_for_jobset():
    validator = jsonschema.Draft202012Validator(JOBSET)
    document = load("gke_jobset.yaml")
    assert list(validator.iter_errors(document)) == []
    document["spec"]["failurePolicy"]["rules"][0].pop("name")
    document["spec"]["startupPolicy"] = {}
    assert len(list(validator.iter_errors(document))) == 2


@pytest.mark.parametrize("name", ["gke_batch.yaml", "gke_jobset.yaml"])
def test_chips_add_up(name):
    """A machine's chips x hosts = the topology; workers by themselves have a slice of one host each."""
    (job,) = jobs(load(name))
    limits = container(job)["resources"]
    hosts = 1 if name == "gke_batch.yaml" else job["spec"]["parallelism"]
    assert limits["limits"] == limits["requests"] and job["spec"]["parallelism"] == job["spec"]["completions"]
    assert hosts * limits["limits"]["google.com/tpu"] == chips(job)


def test_the_mesh_takes_all_devices_and_the_batch_fits():
    (job,) = jobs(load("gke_jobset.yaml"))
    run = asked(container(job)["command"])
    assert pod(job)["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"  # one device a chip
    assert run.mesh.data * run.mesh.fsdp == chips(job) and run.erase.batch % chips(job) == 0


@pytest.mark.parametrize(("name", "stopped"), [("gke_batch.yaml", "FailIndex"), ("gke_jobset.yaml", "FailJob")])
def test_1_and_2_stop_and_all_else_is_tried_again(name, stopped):
    document = load(name)
    (job,) = jobs(document)
    disruption, codes = job["spec"]["podFailurePolicy"]["rules"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert codes["action"] == stopped and container(job)["name"] == codes["onExitCodes"]["containerName"]
    assert (codes["onExitCodes"]["operator"], codes["onExitCodes"]["values"]) == ("In", [1, 2])
    if stopped == "FailIndex":
        assert disruption["action"] == "Ignore" and job["spec"]["backoffLimitPerIndex"] > 0
    else:  # Kubernetes ends the Job, and JobSet reads in its message why
        assert disruption["action"] == "FailJob" and job["spec"]["backoffLimit"] == 0
        assert document["spec"]["failurePolicy"]["maxRestarts"] > 0


def asked(command):
    """The settings of a command's --model, --config and --config.KEY, read and checked as `aegis` does."""
    options = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
    overrides = [(key.removeprefix("config."), value) for key, value in options.items() if key.startswith("config.")]
    return settings(options["model"], [options.get("concept", "star")], options["config"], overrides)


def test_commands_are_understood():
    command = container(jobs(load("gke_batch.yaml"))[0])["command"]
    assert command[:2] == ["aegis", "batch"] and asked(command).erase.trainable == "xattn"
    command = container(jobs(load("gke_jobset.yaml"))[0])["command"]
    args, rest = cli._parser().parse_known_args(command[1:])
    assert args.auto_resume and args.out.startswith("/shared/")
    assert all(word.startswith("--config.") for word in rest)
