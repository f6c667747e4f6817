"""Bits by budget: an error table, a solver under an engine's rules, and the plan that they make."""

from alphaquant.allocation.budget import Budget
from alphaquant.allocation.candidates import Candidate, parse_candidates
from alphaquant.allocation.estimate import Means, Strategy, error_table
from alphaquant.allocation.problem import Assignment
from alphaquant.allocation.propose import Limits, Proposer
from alphaquant.allocation.request import Frontier, Point, Proposal, Request, Search, frontier, propose, to_fill
from alphaquant.allocation.table import ErrorTable, Row

__all__ = [
    "Assignment",
    "Budget",
    "Candidate",
    "ErrorTable",
    "Frontier",
    "Limits",
    "Means",
    "Point",
    "Proposal",
    "Proposer",
    "Request",
    "Row",
    "Search",
    "Strategy",
    "error_table",
    "frontier",
    "parse_candidates",
    "propose",
    "to_fill",
]
