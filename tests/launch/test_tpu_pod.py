"""launch/tpu_pod.sh and what it runs on hosts, against a `gcloud` that plays a cloud."""

import re
import shutil

import pytest

from tests.launch import stubs
from tests.launch.stubs import LAUNCH

SCRIPT = LAUNCH / "tpu_pod.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

# Each look at the machines says and removes a line of `states`; after the last they run, and the run is over.
CLOUD = r"""
found() { [[ -e $FAKE/there ]] || { echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; }; }
look() {
  found
  if [[ -s $FAKE/states ]]; then
    line=$(head -n 1 "$FAKE/states"); sed -i 1d "$FAKE/states"
    [[ $line != ERROR* ]] || { echo "$line" >&2; exit 1; }
    tr , '\n' <<<"$line"
  else echo "$1"; touch "$FAKE/over"; fi
}
for word; do [[ $word != *startup-script=* ]] || cp "${word#*startup-script=}" "$FAKE/startup"; done
case "$*" in
  *"queued-resources create"* | *"managed create"*) touch "$FAKE/there" ;;
  *"queued-resources delete"* | *"managed delete"*) [[ -e $FAKE/there ]] && rm "$FAKE/there" ;;
  *"queued-resources describe"*) look ACTIVE ;;
  *"managed describe"*) found ;;
  *"managed list-instances"*) look "$RUNNING" ;;
  "config get-value project") echo PROJECT ;;
  "storage cat "*) [[ -e $FAKE/over ]] && echo -e "${CODE:-0} host-0" ;;
esac
"""
BATCH = ["--", "aegis", "batch", "my plan.csv", "--model", "world"]
ERASE = ["--nfs", "10.0.0.2:/share", "--", "aegis", "erase", "--concept", "Van Gogh"]


@pytest.fixture
def cloud(tmp_path):
    stubs.write(tmp_path, gcloud=CLOUD, git="[[ $* != *rev-parse* ]] || echo 0123456789ab", sleep="true")
    return tmp_path


def pod(folder, action, tpu, topology, *more, dry=False, **environment):
    options = [
        "--name",
        "art",
        "--zone",
        "us-east5-b",
        "--tpu",
        tpu,
        "--topology",
        topology,
        "--run",
        "gs://bucket/art",
    ]
    return stubs.run(folder, SCRIPT, *["--dry-run"] * dry, action, *options, *more, **environment)


def asked(folder, *words):
    """The calls with all these words, without the `gcloud` at their head."""
    calls = [line.removeprefix("gcloud ") for line in stubs.calls(folder) if line.startswith("gcloud ")]
    return [line for line in calls if all(word in line for word in words)]


def changes(folder):
    """What was created and deleted, in order."""
    kinds = {"queued-resources": "queued", "instance-groups": "group", "instance-templates": "template"}
    pattern = r"(queued-resources|instance-groups|instance-templates|resource-policies).*? (create|delete)"
    lines = [re.search(pattern, line) for line in stubs.calls(folder)]
    return [f"{found[2]} {kinds.get(found[1], 'policy')}" for found in lines if found]


def test_queued_waits_and_replaces_what_was_pre_empted(cloud):
    (cloud / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\nSUSPENDED\nWAITING_FOR_RESOURCES\n")
    done = pod(cloud, "up", "v5e", "2x4", *BATCH)
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("art-0: ") for line in done.stdout.splitlines() if line.startswith("art-0")]
    assert told == [
        "ABSENT",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
        "SUSPENDED",
        "WAITING_FOR_RESOURCES",
        "ACTIVE",
    ]
    assert changes(cloud) == ["create queued", "delete queued", "create queued", "delete queued"]
    create, again = asked(cloud, "queued-resources create")
    assert create == again and create.startswith(
        "compute tpus queued-resources create art-0 --zone=us-east5-b --node-id=art-0 --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --metadata-from-file=startup-script="
    )
    assert set(asked(cloud, "queued-resources delete")) == {
        "compute tpus queued-resources delete art-0 --zone=us-east5-b --force --quiet"
    }


@pytest.mark.parametrize(("tpu", "topology"), [("v5e", "2x4"), ("v6e", "2x4")])
def test_an_error_is_not_an_absence(cloud, tpu, topology):
    (cloud / "states").write_text("ERROR: 503\nERROR: 503\n")
    (cloud / "there").touch()
    done = pod(cloud, "up", tpu, topology, *BATCH, RUNNING="RUNNING")
    assert done.returncode == 0 and "art-0: UNKNOWN: ERROR: 503" in done.stdout
    assert not [change for change in changes(cloud) if change.startswith("create")]


def test_queued_has_one_resource_for_each_slice(cloud):
    assert pod(cloud, "up", "v5e", "2x2", "--slices", "3", "--on-demand", "--keep", *BATCH).returncode == 0
    created = asked(cloud, "queued-resources create")
    # The stub's cloud knows one machine, so the others count as there with it; but all are asked for.
    assert "--node-id=art-0" in created[0] and "v5litepod-4" in created[0] and "--spot" not in created[0]
    looks = {line.split()[4] for line in asked(cloud, "queued-resources describe")}
    assert looks == {"art-0", "art-1", "art-2"} and changes(cloud).count("delete queued") == 0


def test_one_that_cannot_be_made_ends_it(cloud):
    (cloud / "states").write_text("FAILED\n")
    done = pod(cloud, "up", "v5e", "2x4", *BATCH)
    assert done.returncode == 2 and "art-0 could not be made" in done.stderr and done.stderr.count("\n") == 1


def test_group_of_one_slice_is_replaced_as_a_whole(cloud):
    (cloud / "states").write_text("STAGING,RUNNING\nRUNNING,RUNNING\nRUNNING,TERMINATED\nRUNNING,STAGING\n")
    done = pod(cloud, "up", "v5p", "2x2x2", *ERASE, RUNNING="RUNNING\nRUNNING")
    assert done.returncode == 0, done.stderr
    made, gone = (
        ["create policy", "create template", "create group"],
        ["delete group", "delete template", "delete policy"],
    )
    assert changes(cloud) == [*made, *gone, *made, *gone]
    told = [line.removeprefix("art-0: ") for line in done.stdout.splitlines() if line.startswith("art-0")]
    waiting = "WAITING (1 of 2 run)"
    assert told == ["ABSENT", waiting, "ACTIVE", "SUSPENDED", waiting, "ACTIVE"]
    assert "--type=HIGH_THROUGHPUT --accelerator-topology=2x2x2" in asked(cloud, "workload-policy")[0]
    template, group = asked(cloud, "templates create")[0], asked(cloud, "managed create")[0]
    assert "--machine-type=ct5p-hightpu-4t" in template and "--provisioning-model=SPOT" in template
    policy = "projects/PROJECT/regions/us-east5/resourcePolicies/art"
    assert f"--size=2 --workload-policy={policy} --default-action-on-vm-failure=do-nothing" in group


def test_group_of_workers_keeps_itself(cloud):
    """Compute Engine starts again what was pre-empted: nothing is deleted before the run is over."""
    (cloud / "states").write_text("RUNNING,TERMINATED,RUNNING\nRUNNING,RUNNING,RUNNING\n")
    done = pod(cloud, "up", "v6e", "2x4", "--slices", "3", *BATCH, RUNNING="RUNNING\nRUNNING\nRUNNING", CODE="1")
    assert done.returncode == 1 and "exit code 1" in done.stdout
    assert changes(cloud) == ["create template", "create group", "delete group", "delete template"]
    assert "--machine-type=ct6e-standard-8t" in asked(cloud, "templates create")[0]
    assert asked(cloud, "managed create")[0].endswith("--size=3 --quiet")


def test_what_is_installed_is_the_commit_and_what_is_run_is_the_command(cloud):
    if shutil.which("git") is None or not (LAUNCH.parent / ".git").exists():
        pytest.skip("not a git checkout")
    (cloud / "bin" / "git").unlink()  # the real one
    (cloud / "my plan.csv").write_text("name\nstar\n")
    done = pod(cloud, "up", "v6e", "2x2", "--send", "my plan.csv", *BATCH, RUNNING="RUNNING")
    assert done.returncode == 0, done.stderr
    startup = (cloud / "startup").read_text()
    assert "COMMAND=(aegis batch my\\ plan.csv --model world --out gs://bucket/art/out )" in startup
    assert startup.endswith((LAUNCH / "tpu_host.sh").read_text()) and "TOGETHER=false" in startup
    source = re.search(r"^SOURCE=(aegis_jax-[0-9a-f]{12}\.tar\.gz)$", startup, re.MULTILINE)[1]
    sent = [line.split()[-1] for line in asked(cloud, "storage cp")]
    assert sent == [f"gs://bucket/art/{source}", "gs://bucket/art/send/"]


@pytest.mark.parametrize(
    ("tpu", "topology", "hosts", "more"),
    [("v5e", "1x1", 1, BATCH), ("v5e", "4x8", 8, ERASE), ("v5p", "2x2x1", 1, ERASE), ("v6e", "2x4", 1, BATCH),
     ("tpu7x", "2x2x4", 4, ERASE)],
)  # fmt: skip
def test_dry_run_prints_what_the_real_one_does(cloud, tpu, topology, hosts, more):
    told = pod(cloud, "up", tpu, topology, *more, dry=True)
    assert told.returncode == 0 and asked(cloud) == [], told.stderr
    done = pod(cloud, "up", tpu, topology, *more, RUNNING="\n".join(["RUNNING"] * hosts))
    assert done.returncode == 0, done.stderr

    def steps(lines):
        named = (re.sub(r"/[^ ]*/(startup.sh|aegis_jax-[0-9a-f]+\.tar\.gz)", r"\1", line).strip() for line in lines)
        return [line for line in named if re.match("gcloud .* (create|delete|cp|rm) ", line)]

    assert steps(told.stdout.splitlines()) == steps(stubs.calls(cloud)) and len(steps(stubs.calls(cloud))) >= 3
    assert f"TOGETHER={'true' if hosts > 1 else 'false'}" in told.stdout
    if tpu != "v5e":
        assert f"--size={hosts} " in told.stdout


def test_the_other_commands(cloud):
    (cloud / "there").touch()
    assert pod(cloud, "status", "v5e", "2x4").stdout == "art-0: ACTIVE\n"
    assert pod(cloud, "logs", "v5e", "2x4").returncode == 0
    (asks,) = asked(cloud, "ssh")
    assert asks.startswith("compute tpus tpu-vm ssh art-0 --zone=us-east5-b --worker=all --command=tail")
    assert asks.endswith("-F\\ /var/lib/aegis/log")
    assert pod(cloud, "collect", "v5e", "2x4", "here").returncode == 0
    assert asked(cloud, "rsync") == ["storage rsync -r gs://bucket/art/out here"]
    assert pod(cloud, "delete", "v5e", "2x4").returncode == 0
    assert changes(cloud) == ["delete queued"] and asked(cloud, "storage rm") == ["storage rm -r gs://bucket/art/exit"]


def test_a_run_that_is_over_is_not_begun_again(cloud):
    (cloud / "over").touch()
    done = pod(cloud, "up", "v5e", "2x4", *BATCH, CODE="2")
    assert done.returncode == 2 and "is over, exit code 2" in done.stdout and changes(cloud) == []


@pytest.mark.parametrize(
    ("codes", "slices", "code"),
    [("2 a", 2, None), ("2 a\\n2 b", 2, 2), ("2 a\\n0 b", 3, 0), ("1 a\\n2 b\\n0 c", 4, 1)],
)
def test_one_worker_of_a_batch_that_could_not_work_does_not_end_the_others(cloud, codes, slices, code):
    """It is over once one has seen everything settled (0, 1), or all have given up."""
    (cloud / "over").touch()
    (cloud / "states").write_text("FAILED\n")  # what it comes to look at if it goes on
    (cloud / "there").touch()
    done = pod(cloud, "up", "v5e", "2x4", "--slices", str(slices), *BATCH, CODE=codes)
    over = f"this run is over, exit code {code}" in done.stdout
    assert over == (code is not None) and (done.returncode == code if over else "could not be made" in done.stderr)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["up", "v9", "2x2", *BATCH], "--tpu v9"),
        (["up", "v6e", "2x", *BATCH], "--topology 2x"),
        (["up", "v6e", "2x3", *BATCH], "6 chips"),
        (["up", "v5p", "1x1", *BATCH], "1 chips"),
        (["up", "v6e", "4x4", *BATCH], "has 4; more --slices"),
        (["up", "v6e", "2x2"], "command to run is missing"),
        (["up", "v6e", "2x2", "--", "aegis", "erase"], "wants --nfs"),
        (["up", "v6e", "2x2", "--slices", "2", *ERASE], "one slice"),
        (["up", "v6e", "2x2", *BATCH, "--out=x"], "--out is added"),
        (["up", "v6e", "2x2", "--send", "nothing.csv", *BATCH], "nothing.csv: no such file"),
        (["up", "v6e", "2x2", "--nmae", "x", *BATCH], "unknown option --nmae"),
        (["collect", "v6e", "2x2"], "where to"),
        (["down", "v6e", "2x2"], "wanted up"),
    ],
)
def test_bad_arguments(cloud, argv, told):
    done = pod(cloud, *argv)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1 and stubs.calls(cloud) == []


# --- what runs on a host: with a bucket that is a folder ---

BUCKET = r"""
[[ $1 == storage ]] || exit 9
shift
words=()
for word; do [[ $word == -* ]] || words+=("${word/#gs:\/\//$FAKE/bucket/}"); done
case ${words[0]} in
  cat) files=$(compgen -G "${words[1]%\*\*}*") && cat $files ;;
  ls) compgen -G "${words[1]%\*\*}*" >/dev/null ;;
  cp) mkdir -p "$(dirname "${words[2]}")" && cp "${words[1]}" "${words[2]}" ;;
esac
"""
METADATA = r"""
case ${!#} in
  */worker-network-endpoints) echo "$ENDPOINTS" ;;
  */agent-worker-number) [[ -n ${OLDER-} ]] && echo 1 ;;
  */worker-id) echo 1 ;;
  *) exit 22 ;;
esac
"""
# Ends with the codes of the file `codes`, one after the other, and writes down what JAX would be told.
WORK = r"""
env | grep -E "^(AEGIS_(NUM|PROC)|JAX_)" | sort >"$FAKE/told"
code=$(head -n 1 "$FAKE/codes"); sed -i 1d "$FAKE/codes"; exit "$code"
"""


@pytest.fixture
def host(tmp_path):
    fakes = {"apt-get": "true", "mount": "false", "sleep": "[[ $1 != 60 ]]"}
    stubs.write(tmp_path, gcloud=BUCKET, curl=METADATA, aegis=WORK, hostname="echo h1", **fakes)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "ready-source").touch()
    return tmp_path


def start(folder, codes, together="false", **environment):
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    settings = f"RUN=gs://b/r SOURCE=source TOGETHER={together} NFS='' NAME=art WORK={folder / 'work'}\n"
    settings += "COMMAND=(aegis batch)\n"
    (folder / "startup.sh").write_text(settings + (LAUNCH / "tpu_host.sh").read_text())
    return stubs.run(folder, "bash", "startup.sh", **environment)


def marks(folder):
    return {path.name: path.read_text().split()[0] for path in (folder / "bucket" / "b" / "r" / "exit").glob("*")}


@pytest.mark.parametrize(("codes", "mark"), [([0], "0"), ([1], "1"), ([2], "2"), ([137, 134, 0], "0"), ([143, 2], "2")])
def test_a_host_tries_again_after_signals_only(host, codes, mark):
    assert start(host, codes).returncode == 0
    assert marks(host) == {"h1": mark} and (host / "codes").read_text() == ""
    log = (host / "bucket" / "b" / "r" / "logs" / "h1.log").read_text()
    assert re.findall(r"ended with (\d+)", log) == [str(code) for code in codes]


def test_a_host_does_nothing_once_another_has_ended_for_good(host):
    (host / "bucket" / "b" / "r" / "exit").mkdir(parents=True)
    (host / "bucket" / "b" / "r" / "exit" / "h7").write_text("0 h7\n")
    assert start(host, [1]).returncode == 0 and (host / "codes").read_text() == "1\n"


def test_a_worker_of_a_batch_goes_on_where_another_could_not(host):
    (host / "bucket" / "b" / "r" / "exit").mkdir(parents=True)
    (host / "bucket" / "b" / "r" / "exit" / "h7").write_text("2 h7\n")
    assert start(host, [137, 0]).returncode == 0 and marks(host) == {"h1": "0", "h7": "2"}
    assert start(host, [1], together="true", ENDPOINTS="10.0.0.7").returncode == 0
    assert marks(host)["h1"] == "0"  # of hosts that work together the end of one is all's


@pytest.mark.parametrize("older", ["", "yes"])
def test_hosts_of_a_slice_know_one_another(host, older):
    """By either API's metadata. This is the second of two; that all is done the first says, once it has collected."""
    ends = "unknown:unknown:10.0.0.7,unknown:unknown:10.0.0.8" if older else "10.0.0.7,10.0.0.8"
    assert start(host, [0], together="true", ENDPOINTS=ends, OLDER=older).returncode == 0
    assert (host / "told").read_text().splitlines() == [
        "AEGIS_NUM_PROCESSES=2", "AEGIS_PROCESS_ID=1", "JAX_COORDINATOR_ADDRESS=10.0.0.7:8476",
    ]  # fmt: skip
    assert marks(host) == {}
    assert start(host, [134, 2], together="true", ENDPOINTS=ends, OLDER=older).returncode == 0 and marks(host) == {
        "h1": "2"
    }
