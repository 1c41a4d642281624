"""Objects that join the parts for a particular way of working."""
