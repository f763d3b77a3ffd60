"""One job over many processes: who does which slide, and what is known of it."""
