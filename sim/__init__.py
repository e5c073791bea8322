"""Virtual time: device profiles, networks, workers and the experiments."""
