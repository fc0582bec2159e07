"""`python -m vllm_mlx` is the `vllm-mlx` command."""

from vllm_mlx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
