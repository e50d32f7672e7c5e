package main

// What a request costs. Compare ratios of one run, not times of two.

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// pairs runs two sides in turn and reports the median of the ratios of their rates.
func pairs(b *testing.B, of string, requests int, ours, theirs func() time.Duration) {
	b.Helper()
	var ratios, our, their []float64
	rate := func(took time.Duration) float64 { return float64(requests) / took.Seconds() }
	for b.Loop() {
		var x, y time.Duration
		if len(ratios)%2 == 0 {
			x = ours()
			y = theirs()
		} else {
			y = theirs()
			x = ours()
		}
		our, their, ratios = append(our, rate(x)), append(their, rate(y)), append(ratios, y.Seconds()/x.Seconds())
	}
	b.ReportMetric(median(ratios), "of-"+of)
	b.ReportMetric(median(our), "req/s")
	b.ReportMetric(median(their), of+"/s")
	b.ReportMetric(0, "ns/op")
}

func BenchmarkGet(b *testing.B) {
	const contracts = 100_000
	answer := filepath.Join(b.TempDir(), "answer")
	if err := os.WriteFile(answer, benchDocument(b, benchBody, benchKey(0).Contract), 0o600); err != nil {
		b.Fatal(err)
	}
	service, router := served(b, benchFile(b, contracts)), bare(b, "answer", answer)
	for _, n := range []int{1, 16, 64, 256} {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			ours, theirs := service.lines(b, n, "GET", "", false), router.lines(b, n, "GET", "", false)
			each := 12_800 / n
			if n == 1 {
				each = 3000
			}
			s0, r0 := cpuTime(b, service.pid), cpuTime(b, router.pid)
			pairs(b, "router", n*each,
				func() time.Duration { return round(b, ours, each, contracts) },
				func() time.Duration { return round(b, theirs, each, contracts) })
			tot := float64(b.N * n * each)
			b.ReportMetric(float64((cpuTime(b, service.pid)-s0).Microseconds())/tot, "cpu-us")
			b.ReportMetric(float64((cpuTime(b, router.pid)-r0).Microseconds())/tot, "router-cpu-us")
		})
	}
}

func BenchmarkPut(b *testing.B) {
	const contracts = 100_000
	file := benchFile(b, contracts)
	service, raw := served(b, copyOf(b, file)), newRawStore(b, copyOf(b, file))
	value := seal(benchKey(0).bytes(), benchDocument(b, benchBody, benchKey(0).Contract))
	for _, n := range []int{1, 16, 64, 256} {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			ours := service.lines(b, n, "PUT", benchBody, false)
			each := 6_400 / n
			if n == 1 {
				each = 1000
			}
			pairs(b, "bbolt", n*each,
				func() time.Duration { return round(b, ours, each, contracts) },
				func() time.Duration { return raw.round(b, n, each, contracts, value) })
		})
	}
}

func BenchmarkPutLatency(b *testing.B) {
	const contracts, each = 100_000, 500
	file := benchFile(b, contracts)
	service := served(b, copyOf(b, file))
	db, err := bbolt.Open(copyOf(b, file), 0o600, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	value := seal(benchKey(0).bytes(), benchDocument(b, benchBody, benchKey(0).Contract))
	lines := service.lines(b, 1, "PUT", benchBody, false)
	pairs(b, "bbolt", 1,
		func() time.Duration {
			round(b, lines, each, contracts)
			return median(lines[0].took)
		},
		func() time.Duration {
			var took []time.Duration
			for range each {
				key := benchKey(rand.IntN(contracts)).bytes()
				began := time.Now()
				if err := db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketContracts).Put(key, value) }); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			return median(took)
		})
}

func BenchmarkPutYear(b *testing.B) {
	const contracts = 100_000
	file := benchFile(b, contracts)
	service, dive := served(b, copyOf(b, file)), bare(b, "dive", copyOf(b, file))
	ours, theirs := service.lines(b, 1, "PUT", yearBody(), false), dive.lines(b, 1, "PUT", yearBody(), false)
	const each = 30
	pairs(b, "dive", each,
		func() time.Duration { return round(b, ours, each, contracts) },
		func() time.Duration { return round(b, theirs, each, contracts) })
}

func BenchmarkList(b *testing.B) {
	const contracts = 100_000
	service := served(b, benchFile(b, contracts))
	first := service.lines(b, 1, "GET", "", true)[0]
	if err := first.ask(); err != nil {
		b.Fatal(err)
	}
	_ = first
	answer := filepath.Join(b.TempDir(), "answer")
	var list []byte
	list = append(list, '[')
	for i := range contractsOfUser {
		if i > 0 {
			list = append(list, ',')
		}
		list = append(list, benchDocument(b, benchBody, benchKey(i).Contract)...)
	}
	list = append(list, ']')
	if err := os.WriteFile(answer, list, 0o600); err != nil {
		b.Fatal(err)
	}
	router := bare(b, "answer", answer)
	for _, n := range []int{1, 64} {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			ours, theirs := service.lines(b, n, "GET", "", true), router.lines(b, n, "GET", "", true)
			each := 6_400 / n
			if n == 1 {
				each = 1000
			}
			pairs(b, "router", n*each,
				func() time.Duration { return round(b, ours, each, contracts) },
				func() time.Duration { return round(b, theirs, each, contracts) })
		})
	}
}

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
