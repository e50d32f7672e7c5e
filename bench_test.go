package main

// What a request costs. Compare ratios of one run, not times of two.

import "testing"

// A bearer check, in steady state, beside the hash that it cannot do without.
func BenchmarkBearerCheck(b *testing.B) {
	s, check := bearerCheck(b)
	b.Run("hash", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			hashOf(someToken)
		}
	})
	b.Run("check", func(b *testing.B) {
		b.ReportAllocs()
		before := s.db.Stats().TxN
		for b.Loop() {
			check()
		}
		b.ReportMetric(float64(s.db.Stats().TxN-before)/float64(b.N), "transactions/op")
	})
}
