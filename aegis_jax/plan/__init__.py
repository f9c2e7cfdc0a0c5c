"""Will it fit, what will it cost, on a machine that is not there: `aegis plan` (docs/plan.md)."""
