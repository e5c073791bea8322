"""The server side: methods as compositions of parts, pacing, and the one loop."""
