"""The device side: train, shrink, report; the same in simulation and on a device."""
