"""`vllm-mlx completion SHELL`: a completion script made from the parser itself, so that it cannot be out of date."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

Words = Mapping[str, Sequence[str]]


def words_of(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Command → what may follow it: flags, and the words of its positional choices."""
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found: dict[str, list[str]] = {}
    for name, command in commands.choices.items():
        words: list[str] = []
        for action in command._actions:
            words += [flag for flag in action.option_strings if flag.startswith("--")]
            if not action.option_strings and action.choices:
                words += [str(choice) for choice in action.choices]
        found[name] = words
    return found


def script(shell: str, words: Words) -> str:
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words)


def _bash(words: Words) -> str:
    cases = "\n".join(f'    {name}) words="{" ".join(flags)}" ;;' for name, flags in words.items())
    return f"""\
_vllm_mlx() {{
  local words="" current="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then words="{" ".join(words)} --help --version"
  else case "${{COMP_WORDS[1]}}" in
{cases}
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$current") $(compgen -f -- "$current"))
}}
complete -o filenames -F _vllm_mlx vllm-mlx
"""


def _zsh(words: Words) -> str:
    cases = "\n".join(f"    {name}) compadd -- {' '.join(flags)} ;;" for name, flags in words.items())
    return f"""\
#compdef vllm-mlx
_vllm_mlx() {{
  if (( CURRENT == 2 )); then compadd -- {" ".join(words)} --help --version; return; fi
  case "$words[2]" in
{cases}
  esac
  _files
}}
compdef _vllm_mlx vllm-mlx
"""


def _fish(words: Words) -> str:
    lines = [f"complete -c vllm-mlx -f -n __fish_use_subcommand -a '{' '.join(words)}'"]
    for name, flags in words.items():
        for word in flags:
            kind = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c vllm-mlx -n '__fish_seen_subcommand_from {name}' {kind}")
    return "\n".join(lines) + "\n"
