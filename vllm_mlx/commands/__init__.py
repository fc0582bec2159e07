"""Commands for people at a terminal: `chat`, `run`, `models`, `service`, `completion`, and the live line of `serve`."""
