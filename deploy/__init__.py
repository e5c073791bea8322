"""Real time: the same strategies over SuperLink and SuperNodes."""
