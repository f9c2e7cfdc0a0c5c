"""The method (AEGIS) as pure functions: read step.py first."""
