"""What makers of aegis_jax need and its users do not: not part of the installed package."""
