// Promlint reads metrics from standard input as Prometheus does, and prints the objections of
// Prometheus's linter to those whose names begin with the argument.
package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

func main() {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(os.Stdin)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	var ours []*dto.MetricFamily
	for name, family := range families {
		if strings.HasPrefix(name, os.Args[1]) {
			ours = append(ours, family)
		}
	}
	problems, err := promlint.NewWithMetricFamilies(ours).Lint()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, p := range problems {
		fmt.Println(p.Metric, p.Text)
	}
	fmt.Printf("%d families\n", len(ours))
}
