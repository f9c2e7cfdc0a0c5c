"""`aegis evaluate`: attacks, retention and baselines on the same footing, and the page that shows them."""
