"""What a real server does under overload, at its end and over hours; a scenario per module."""
