"""Attacks on one's own training: what can an attacker really tell? Mathematics only, imports none of the other packages."""
