"""The exchange between learner and actors: protocol, durable ledger, weight relay, and the clients that peers hold."""
