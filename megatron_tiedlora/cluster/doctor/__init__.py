"""What a job needs of its hosts, examined before it starts: asked host by host, then tried with its ranks."""
