"""Where the shipped directory is, and how much memory is free. Imported by every command, so free of torch and mlx."""

from pathlib import Path

DEMO = Path(__file__).parents[2] / "vllm_mlx" / "demo"


def memory() -> int:
    """Free memory in bytes; plenty where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return 1 << 40
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
