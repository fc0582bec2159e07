"""IBM Granite 4: Hermes' tags; kept apart from `hermes` for its name, and because 3.x's marker is read too."""

from __future__ import annotations

from vllm_mlx.parsers.tools import hermes
from vllm_mlx.parsers.tools.granite import Granite


class Granite4(Granite):
    name = "granite4"
    aliases = ()
    signs = ()
    envelope = hermes.FORMAT.envelope


FORMAT = Granite4()
