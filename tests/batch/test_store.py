"""Where a batch may lie: folders, and buckets by their own name; not buckets that pretend to be folders."""

import threading
from pathlib import Path

import pytest

from aegis_jax.batch.ledger import Ledger
from aegis_jax.batch.store import open_store, refuse_fuse
from aegis_jax.batch.worker import work
from aegis_jax.errors import AegisError
from tests.batch import racing
from tests.batch.bucket import Bucket

MOUNTS = """\
/dev/vda1 / ext4 rw,relatime 0 0
bucket /data fuse.gcsfuse rw,nosuid 0 0
bucket /data/my\\040bucket fuse rw 0 0
server:/x /data/nfs nfs4 rw 0 0
mountpoint-s3 /s3 fuse rw 0 0
s3fs /s3fs fuse.s3fs rw 0 0
me@host: /far fuse.sshfs rw 0 0
/dev/sdb1 /usb fuseblk rw 0 0
volume /gluster fuse.glusterfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/data", "fuse.gcsfuse"),
        ("/data/runs/x", "fuse.gcsfuse"),
        ("/data/my bucket/x", "fuse"),
        ("/s3/x", "fuse"),
        ("/s3fs", "fuse.s3fs"),
        ("/far/x", "fuse.sshfs"),
    ],
)
def test_gateways_to_buckets_are_refused(folder, kind):
    with pytest.raises(AegisError) as refused:
        open_store(folder, new=True, mounts=MOUNTS)
    assert f"a mount of type {kind} " in str(refused.value) and "gs://" in str(refused.value)


@pytest.mark.parametrize("folder", ["/home/x", "/data/nfs/x", "/data2", "/usb/x", "/gluster/x"])
def test_other_file_systems_are_not(folder):
    refuse_fuse(Path(folder), MOUNTS)


def test_a_link_into_one_is_seen_through(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    with pytest.raises(AegisError, match="fuse.rclone"):
        open_store(link / "out", new=True, mounts=f"remote {real} fuse.rclone rw 0 0")


@pytest.mark.parametrize("new", [True, False])
def test_what_is_no_place_for_one(tmp_path, new):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("mine")
    for place, part in ((tmp_path / "file", "is a file"), ("s3://bucket/x", "give a folder or gs://"), ("gs://b", "b")):
        with pytest.raises(AegisError, match=part):
            open_store(place, new=new)
    with pytest.raises(AegisError, match="holds no batch"):
        open_store(tmp_path / "mine", new=new)
    if not new:
        with pytest.raises(AegisError, match=r"holds no batch: there is no plan\.jsonl"):
            open_store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


def test_create_and_swap(tmp_path):
    store, other = (open_store(tmp_path / "out", new=True) for _ in range(2))
    first = store.create("done/a.json", b"1")
    assert first and other.create("done/a.json", b"2") is None
    second = other.swap("done/a.json", b"3", first)
    assert second and second != first and store.swap("done/a.json", b"4", first) is None
    assert store.read("done/a.json") == (b"3", second) and store.read("done/b.json") == (None, b"")
    store.create("done2/c.json", b"")
    store.create("done/梵高.json", b"")
    assert store.names("done") == {"a.json", "梵高.json"} and store.names("failed") == set()
    values = store.read_all(["done/a.json", "done/x", "done2/c.json"])
    assert [value for value, _ in values] == [b"3", None, b""]


def test_a_store_that_cannot_be_written(tmp_path):
    store = open_store(tmp_path / "out", new=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "claims").write_text("in the way")
    with pytest.raises(AegisError, match="cannot use .*out: ") as refused:
        store.create("claims/a.json", b"")
    assert "\n" not in str(refused.value) and "source locations" not in str(refused.value)


def test_a_bucket(monkeypatch):
    """Workers on gs://, against a service on loopback that keeps its preconditions."""
    service = Bucket()
    threading.Thread(target=service.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", service.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    store, other = (open_store("gs://some-bucket/a/batch", new=True) for _ in range(2))
    first = store.create("claims/a.json", b"1")
    assert first and other.create("claims/a.json", b"2") is None
    assert other.swap("claims/a.json", b"3", first) and store.swap("claims/a.json", b"4", first) is None
    with pytest.raises(AegisError, match="holds no batch"):
        open_store("gs://some-bucket/a/batch")
    plan, log = racing.plan(12), []

    def worker(name):
        mine = Ledger(open_store("gs://some-bucket/a/batch", new=True), name)
        mine.keep_plan(plan)
        work(plan, mine, racing.erase(0.01, log), lambda row: 2, poll=0.01)

    threads = [threading.Thread(target=worker, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    service.shutdown()
    assert sorted(log) == sorted(row.name for row in plan.rows)
    names = {name.removeprefix("a/batch/") for name in service.objects}
    assert {f"results/{row.file}.safetensors" for row in plan.rows} < names and "plan.jsonl" in names
