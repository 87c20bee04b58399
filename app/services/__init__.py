"""What the page and programs call: replies with their routing, runs, live updates, endpoints. No components."""
