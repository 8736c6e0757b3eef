"""Inside the box: loads, trains, saves."""
