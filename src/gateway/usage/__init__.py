"""What model calls use and cost: prices, estimates, and the meter that puts the two together."""
