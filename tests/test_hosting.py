"""Disks that do not last, and files that others do not see: refused at the start, with one line that says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agentflow import hosting, settings
from agentflow.settings import SettingsError
from tests.processes import BIN, ROOT

DATABASE = {"DATABASE_URL": "postgresql://db/x"}
RENDER = {"RENDER": "true"}
HEROKU = {"DYNO": "web.1"}
RAILWAY = {"RAILWAY_PROJECT_ID": "p"}
FLY = {"FLY_MACHINE_ID": "148e"}

#: As Linux shows them (proc_pid_mountinfo(5)): a container's layers, a disk at /var/data, memory, what VOLUME made, and a disk
#: below a folder with a space in its name.
MOUNTS = r"""
600 500 0:90 / / rw,relatime master:1 - overlay overlay rw,lowerdir=/a,upperdir=/b,workdir=/c
601 600 0:93 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755
602 600 259:3 / /var/data rw,relatime - ext4 /dev/nvme1n1 rw
603 600 0:94 / /var/data/cache rw - tmpfs tmpfs rw
604 600 259:1 /var/lib/containerd/io.containerd.grpc.v1.cri/containers/0f/volumes/77 /data rw - ext4 /dev/nvme0n1p1 rw
605 600 259:4 / /srv/my\040disk rw,relatime shared:7 - xfs /dev/sdb rw
606 600 259:1 /var/lib/kubelet/pods/a1/volumes/kubernetes.io~empty-dir/scratch /scratch rw - ext4 /dev/nvme0n1p1 rw
""".strip()


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS)
    return file


@pytest.mark.parametrize(
    ("folder", "lasts"),
    [
        ("/var/data", True),
        ("/var/data/agentflow/storage", True),
        ("/srv/my disk/x", True),
        ("/var/database", False),  # begins alike, and is on the layers
        ("/var/data/cache/x", False),
        ("/home/me", False),
        ("/dev/shm/x", False),
        ("/data/storage", False),
        ("/scratch/x", False),
    ],
)
def test_what_is_on_a_mounted_disk_lasts(folder: str, lasts: bool, mounts: Path) -> None:
    for platform in ("Render", "Fly"):
        assert hosting.survives(Path(folder), platform, {}, mounts) is lasts
    assert hosting.survives(Path(folder), "Heroku", {}, mounts) is False  # has no disks


def test_railway_says_itself_where_its_volume_is(mounts: Path) -> None:
    volume = {"RAILWAY_VOLUME_MOUNT_PATH": "/app/files"}

    assert hosting.survives(Path("/app/files/home"), "Railway", volume, mounts)
    assert not hosting.survives(Path("/var/data"), "Railway", volume, mounts)
    assert not hosting.survives(Path("/var/data"), "Railway", {}, mounts)


def test_this_machines_own_mounts_are_read() -> None:
    assert not hosting.survives(Path("/"), "Render", {})
    assert not hosting.survives(Path("/dev/shm/agentflow"), "Render", {})


@pytest.mark.parametrize("marks", [RENDER, HEROKU, RAILWAY, FLY])
def test_without_a_database_a_platform_that_throws_its_disk_away_is_refused(
    marks: dict[str, str], tmp_path: Path
) -> None:
    home = {"AGENTFLOW_HOME": str(tmp_path)}

    with pytest.raises(SettingsError) as refused:
        settings.load(marks | home)

    assert refused.value.variable == "DATABASE_URL"
    assert str(hosting.ephemeral_platform(marks)) in str(refused.value)
    assert settings.load(home).embedded_database  # elsewhere the disk is kept
    assert settings.load(marks | home | DATABASE).tier == "database only"


def test_a_volume_is_a_home_there(tmp_path: Path) -> None:
    volume = {"RAILWAY_VOLUME_MOUNT_PATH": str(tmp_path), "AGENTFLOW_HOME": str(tmp_path / "home")}

    assert settings.load(RAILWAY | volume).tier == "embedded"
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        settings.load(RAILWAY | volume | {"AGENTFLOW_HOME": "/app"})


@pytest.mark.parametrize("storage", [{}, {"STORAGE_URL": "file:///files"}])
def test_files_in_a_folder_are_refused_where_processes_share_a_database(storage: dict[str, str]) -> None:
    read = settings.load(DATABASE | storage)

    with pytest.raises(SettingsError, match=r"STORAGE_URL: .*STORAGE_SHARED=true"):
        settings.check_files(read, {})

    settings.check_files(settings.load(DATABASE | storage | {"STORAGE_SHARED": "true"}), HEROKU)
    settings.check_files(settings.load(DATABASE | {"STORAGE_URL": "s3://bucket"}), HEROKU)
    settings.check_files(settings.load(storage), {})  # embedded: one machine


def test_one_process_for_everything_may_keep_files_in_a_folder_that_lasts(tmp_path: Path) -> None:
    read = settings.load(DATABASE | {"STORAGE_URL": (tmp_path / "files").as_uri()})

    settings.check_files(read, {}, alone=True)
    settings.check_files(read, RAILWAY | {"RAILWAY_VOLUME_MOUNT_PATH": str(tmp_path)}, alone=True)
    with pytest.raises(SettingsError, match=r"STORAGE_URL: .*Heroku throws the folder .* away"):
        settings.check_files(read, HEROKU, alone=True)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "scheduler"],
        [str(BIN / "gunicorn"), "-c", "web/gunicorn_config.py", "web.wsgi:app"],
        [str(BIN / "dramatiq"), "actors", "--processes", "1"],
    ],
)
def test_the_processes_of_a_procfile_refuse_to_lose_files(command: list[str], tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "AGENTFLOW_HOME": str(tmp_path), **DATABASE, **HEROKU}

    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("agentflow: ")]
    assert len(said) == 1 and "STORAGE_URL" in said[0] and "STORAGE_SHARED" in said[0], ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [["up"], ["queues"], ["doctor"]])
def test_a_heroku_dyno_without_a_database_is_told_so_in_one_line(command: list[str], tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "AGENTFLOW_HOME": str(tmp_path / "home"), **HEROKU}

    ended = subprocess.run(
        [sys.executable, "-m", "agentflow.cli", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == 2
    assert ended.stderr.startswith("agentflow: DATABASE_URL: ") and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "home").exists()
