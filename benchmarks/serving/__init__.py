"""What serving costs: throughput, start-up, recording, builds."""
