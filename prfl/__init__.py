"""Federated learning that prunes: the domain, without Flower and without a clock."""
