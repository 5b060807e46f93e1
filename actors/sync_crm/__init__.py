"""Keeps the mirror of a CRM account in step: changes, re-reads by id, walks over everything, and plans of all of these."""
