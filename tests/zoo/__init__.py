"""Tiny seeded networks, each with something that a way of making networks fast could get wrong."""

from tests.zoo import behaviour, between, reparametrised, sharing, standard
from tests.zoo.registry import CLASSES, ZOO, Specimen, give_statistics, register

__all__ = [
    "CLASSES",
    "ZOO",
    "Specimen",
    "behaviour",
    "between",
    "give_statistics",
    "register",
    "reparametrised",
    "sharing",
    "standard",
]
