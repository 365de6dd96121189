"""What several tests share: tiny models and data, plain formulas, launches."""
