"""Knowledge injection: facts put into a model's weights, and what they do there."""
