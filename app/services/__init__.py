"""What the page and programs call: replies, the list of runs, charts. No components are made here."""
