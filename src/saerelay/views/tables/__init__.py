"""Tables for the terminal: one module per subject, each made from plans and documents."""
