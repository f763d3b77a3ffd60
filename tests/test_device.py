"""Free memory within the limits of control groups, read from a folder laid out as Linux does."""

from pathlib import Path

import pytest
import torch

from hmil_fast.device import free_memory

CPU = torch.device("cpu")
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 64 GB of which 50 GB are available."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 50000000 kB\n")
    return tmp_path


def belongs_to(root: Path, *lines: str) -> None:
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def limit_v2(group: Path, limit: object, used: int, unused: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 12\ninactive_file {unused}\n")


def limit_v1(group: Path, limit: int, used: int, unused: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {unused}\n")


def test_without_groups_what_the_machine_has_available_is_free(root: Path) -> None:
    assert free_memory(CPU, root) == 50_000_000 * 1024
    belongs_to(root, "0::/user.slice")  # no such folder
    assert free_memory(CPU, root) == 50_000_000 * 1024


def test_the_tightest_of_nested_limits_holds(root: Path) -> None:
    job = root / "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    belongs_to(root, "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    limit_v2(job / "step_0/user/task_0", "max", 10)
    limit_v2(job / "step_0/user", "max", 10)
    limit_v2(job / "step_0", 9 * 10**9, 10**9)
    assert free_memory(CPU, root) == 8 * 10**9
    limit_v2(job, 8 * 10**9, 3 * 10**9, unused=10**9)  # other steps use memory of the job too
    assert free_memory(CPU, root) == 6 * 10**9
    limit_v2(job / "step_0/user/task_0", 2 * 10**9, 10)
    assert free_memory(CPU, root) == 2 * 10**9 - 10


def test_a_container_is_limited_by_the_group_at_its_mount(root: Path) -> None:
    limit_v2(root / "sys/fs/cgroup", 3 * 10**9, 10**9)
    for path in ("/", "/../other", "/kubepods/pod1/of the host"):
        belongs_to(root, f"0::{path}")
        assert free_memory(CPU, root) == 2 * 10**9


def test_groups_of_version_1_are_read_too(root: Path) -> None:
    memory = root / "sys/fs/cgroup/memory"
    belongs_to(root, "9:cpu,cpuacct:/", "4:memory:/slurm/uid_5/job_7/step_0", "0::/")
    limit_v1(memory, NO_LIMIT_V1, 40 * 10**9)
    limit_v1(memory / "slurm/uid_5/job_7", 4 * 10**9, 3 * 10**9, unused=5 * 10**8)
    limit_v1(memory / "slurm/uid_5/job_7/step_0", 5 * 10**9, 10**9)
    assert free_memory(CPU, root) == 15 * 10**8


def test_a_limit_that_is_passed_already_leaves_nothing(root: Path) -> None:
    belongs_to(root, "0::/")
    limit_v2(root / "sys/fs/cgroup", 10**9, 10**9 + 4096)
    assert free_memory(CPU, root) == 0


def test_this_machine_has_memory() -> None:
    assert free_memory(CPU) > 0
